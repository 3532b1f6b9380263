"""For all tests: none asserts wall time, so neither do hypothesis's deadlines."""

from hypothesis import settings

settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")
