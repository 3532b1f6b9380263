"""Give sweeps an MLflow user of their own, who is no administrator. Safe to run again."""

import os

from mlflow.exceptions import RestException
from mlflow.server.auth.client import AuthServiceClient

client = AuthServiceClient(os.environ["MLFLOW_TRACKING_URI"])
name, password = os.environ["CLIENT_USERNAME"], os.environ["CLIENT_PASSWORD"]
try:
    client.get_user(name)
    client.update_user_password(name, password)
    print(f"user {name}: password set")
except RestException as error:
    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
        raise
    client.create_user(name, password)
    print(f"user {name}: created")
