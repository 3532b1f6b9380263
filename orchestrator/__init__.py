"""QLoRA sweeps over packs and slots: config, data, search, planning, training, tracking.

Nothing in this package imports ray or kubernetes; nothing here imports torch, mlflow or
deepspeed until a function that needs them runs.
"""

__version__ = "0.1.0"
