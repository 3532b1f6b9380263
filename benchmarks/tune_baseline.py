"""The same sweep as people do it today: Ray Tune's grid, one HF Trainer per GPU, MLflow's registry.

    python -m benchmarks.tune_baseline SWEEP.yaml FOLDER

Takes an orchestrator's configuration for what is trained, and trains it with stock parts: PEFT on a
bitsandbytes base, gradient checkpointing, paged 8-bit AdamW, bf16. The rows are packed by the
project's own code, so that both sides see the same blocks.
"""

import sys
from pathlib import Path
from typing import Any

from orchestrator.config import SweepConfig
from orchestrator.data.manifest import Manifest, load_manifest
from orchestrator.data.prepare import prepare
from orchestrator.files import cache_dir
from orchestrator.loading import load_config, trial_with


def main() -> None:
    config_path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    config = load_config(config_path)
    data = prepare(config.data, Path(config.base_model.source), cache_dir())
    best = tune_grid(config, data.train.folder, folder)
    version = _register(config, best, folder.absolute())
    print(f"registered: models:/{config.registered_model_name}@champion (version {version})")


def tune_grid(config: SweepConfig, shards: Path, folder: Path) -> Any:
    """Ray's result of the trial with the least held-out loss."""
    import ray
    import torch
    from ray import tune

    ray.init(address="local", include_dashboard=False)
    gpus = torch.cuda.device_count()
    need = {"cpu": 1, "gpu": 1} if gpus else {"cpu": 1}
    constants = {"config": config, "shards": str(shards)}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_train, **constants), need),
        param_space={
            name: tune.grid_search(list(values)) for name, values in config.search.space.items()
        },
        tune_config=tune.TuneConfig(
            metric="eval_loss", mode="min", max_concurrent_trials=max(1, gpus)
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder.absolute())),
    )
    results = tuner.fit()
    for result in results:
        # Not from the trial itself: Ray shows like lines of several workers once.
        print(f"trial failed: {result.error}" if result.error else f"trial done: {result.metrics}")
    best = results.get_best_result()
    ray.shutdown()
    return best


def _train(params: dict[str, Any], config: SweepConfig, shards: str) -> None:
    """One trial, in a process of its own with one GPU."""
    import torch
    from ray import tune
    from transformers import Trainer, TrainingArguments

    from benchmarks.stock import load_for_training

    trial = trial_with(config.trial, params)
    torch.manual_seed(trial.seed)
    model = load_for_training(
        Path(config.base_model.source),
        trial.quant.bit_width,
        trial.adapter.rank,
        trial.adapter.alpha,
    )
    folder = Path(tune.get_context().get_trial_dir())
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=trial.steps,
        per_device_train_batch_size=trial.batch_size,
        per_device_eval_batch_size=config.evaluation.batch_size,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim=trial.optimizer.name,
        learning_rate=trial.optimizer.learning_rate,
        weight_decay=trial.optimizer.weight_decay,
        max_grad_norm=trial.optimizer.max_grad_norm or 0.0,
        lr_scheduler_type=trial.schedule.kind,
        warmup_steps=trial.schedule.warmup_steps,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=trial.seed,
        logging_steps=trial.steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        prediction_loss_only=True,
    )
    train, held_out = (_Blocks(load_manifest(shards, role)) for role in ("train", "held_out"))
    trainer = Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=held_out)
    trainer.train()
    eval_loss = trainer.evaluate()["eval_loss"]
    model.save_pretrained(folder / "adapter")
    tune.report({"eval_loss": eval_loss, "adapter": str(folder / "adapter")})


class _Blocks:
    """Packed blocks as HF's Trainer takes them. Each is one document; the model shifts labels."""

    def __init__(self, manifest: Manifest) -> None:
        from orchestrator.data.reader import BlockReader

        self._reader = BlockReader(manifest)

    def __len__(self) -> int:
        return self._reader.num_blocks

    def __getitem__(self, index: int) -> dict[str, Any]:
        input_ids = self._reader.blocks([index]).input_ids[0]
        return {"input_ids": input_ids, "labels": input_ids}


def _register(config: SweepConfig, best: Any, folder: Path) -> str:
    import mlflow
    from mlflow import MlflowClient

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    client = MlflowClient()
    experiment = client.create_experiment(config.name, str(folder / "artifacts"))
    name = config.registered_model_name
    with mlflow.start_run(experiment_id=experiment) as run:
        mlflow.log_params(best.config)
        mlflow.log_metric("eval_loss", best.metrics["eval_loss"])
        mlflow.log_artifacts(best.metrics["adapter"], "adapter")
        client.create_registered_model(name)
        source = f"{run.info.artifact_uri}/adapter"
        version = client.create_model_version(name, source, run.info.run_id).version
    client.set_registered_model_alias(name, "champion", version)
    return str(version)


if __name__ == "__main__":
    main()
