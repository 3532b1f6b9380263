"""A walk through MLflow's UI on a finished sweep, in headless Chromium: what a user should find.

With ORCHESTRATOR_SCREENSHOTS=docs/images it also writes the screenshots that the guide shows:

    ORCHESTRATOR_SCREENSHOTS=docs/images python -m pytest tests/integration/test_ui_walk.py
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.mlflow_view import MlflowView
from orchestrator.tracking.registry import Registration, Registry
from orchestrator.tracking.report import write_report
from tests import runs as samples
from tests.integration.servers import mlflow_server

pytestmark = pytest.mark.slow  # a server and a browser: a minute

SCREENSHOTS = os.environ.get("ORCHESTRATOR_SCREENSHOTS")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_MS = 60_000
# As MLflow 3.17 names them in its pages.
ASSISTANT = "[data-component-id='mlflow.assistant.chat_panel.close']"
EXPANDER = "button[data-component-id*=runnamecellrenderer]"


@dataclass(frozen=True)
class Walk:
    page: Any
    address: str
    view: MlflowView
    store: RunStore
    registration: Registration

    def open(self, place: str) -> None:
        self.page.goto(f"{self.address}/#/{place}")

    def sees(self, *texts: str) -> None:
        for text in texts:
            self.page.get_by_text(text).first.wait_for(timeout=WAIT_MS)

    def expand(self) -> None:
        """Show the trials of the sweep, if they are hidden."""
        if not self.page.get_by_text("trial 003").count():
            self.page.locator(EXPANDER).first.click()

    def shoot(self, name: str) -> None:
        if SCREENSHOTS:
            self.page.wait_for_timeout(1500)  # charts are drawn with a transition
            self.page.screenshot(path=str(Path(SCREENSHOTS) / f"mlflow-{name}.png"))


@pytest.fixture(scope="module")
def walk(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed (none of {', '.join(BROWSERS)})")
    folder = tmp_path_factory.mktemp("walk")
    shutil.copy(uri.removeprefix("sqlite:///"), folder / "mlflow.db")
    store = samples.make_run(folder / "run", run_id="demo-20261122-1")
    with mlflow_server(f"sqlite:///{folder}/mlflow.db") as address:
        view = MlflowView(store, address)
        view.connect()
        view.sync()
        registration = Registry(address).register_winner(store, view)
        write_report(store)
        view.finish("FINISHED")
        with playwright.sync_playwright() as driver:
            chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page(viewport={"width": 1500, "height": 820})
            page.set_default_timeout(WAIT_MS)
            page.goto(address)
            page.locator(ASSISTANT).click()  # it covers a third of the page
            page.get_by_role("button", name="Model training").click()
            yield Walk(page, address, view, store, registration)
            chromium.close()


def test_the_runs_table_nests_the_trials_in_the_sweep(walk: Walk) -> None:
    walk.open(f"experiments/{walk.view.experiment_id}/runs")
    walk.sees(walk.store.sweep.run_id)
    walk.expand()
    walk.sees("trial 003 · 16-bit · rank 16", "trial 000 · 4-bit · rank 4")
    walk.shoot("runs")


def test_the_sweeps_page_describes_the_winner(walk: Walk) -> None:
    walk.open(f"experiments/{walk.view.experiment_id}/runs/{walk.view.run_id}")
    walk.sees("Winner: trial 003 · 16-bit · rank 16.", "Held-out loss:")
    walk.shoot("sweep")


def test_trials_are_compared_in_charts(walk: Walk) -> None:
    walk.open(f"experiments/{walk.view.experiment_id}/runs?compareRunsMode=CHART")
    walk.sees(walk.store.sweep.run_id)
    walk.expand()
    walk.sees("eval_loss", "by_tokens")
    walk.page.locator(".js-plotly-plot").first.wait_for(timeout=WAIT_MS)
    walk.shoot("charts")


def test_a_trials_page_shows_its_curves(walk: Walk) -> None:
    run_id = walk.view.trial_run_id(3)
    walk.open(f"experiments/{walk.view.experiment_id}/runs/{run_id}/model-metrics")
    walk.sees("train_loss")
    walk.page.locator(".js-plotly-plot").first.wait_for(timeout=WAIT_MS)
    walk.shoot("trial")


def test_the_registry_shows_alias_tags_and_description(walk: Walk) -> None:
    name = walk.registration.model_name
    walk.open(f"models/{name}")
    walk.sees("champion", "candidate")
    walk.shoot("model")
    walk.open(f"models/{name}/versions/{walk.registration.version}")
    walk.sees("champion", "QLoRA adapter of rank 16", "held_out_digest")
    walk.shoot("version")
