"""MLflow as a view of the run folder, the model registry, and the report.

Everything shown here is read from a RunStore. mlflow and plotly are imported inside functions.
"""
