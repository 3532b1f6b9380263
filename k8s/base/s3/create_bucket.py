"""Make the bucket that MLflow writes to. Safe to run again."""

import os

import boto3

bucket = os.environ["ARTIFACTS_DESTINATION"].removeprefix("s3://").split("/")[0]
client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
if bucket not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
    client.create_bucket(Bucket=bucket)
print(f"bucket {bucket} is there")
