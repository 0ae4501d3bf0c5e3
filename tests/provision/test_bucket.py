"""provision/bucket.sh."""

from __future__ import annotations

from aws_fixtures import Aws, Bundle
from environment_pro import (
    BASE_BUCKET,
    BUCKET,
    check_only_tls,
)
from local_cloud import ACCOUNT_ID, REGION


def test_the_bucket_gets_what_is_new_and_loses_nothing(bundle: Bundle, aws: Aws) -> None:
    s3 = aws.client("s3")
    aws.make_bucket(BASE_BUCKET)
    assert "copied: 2\n" in bundle.run_function("ensure_bucket; copy_files no", "bucket").stdout
    s3.put_object(Bucket=BUCKET, Key="output/job/result.json", Body=b"production's")
    s3.put_object(Bucket=BUCKET, Key="models/own.safetensors", Body=b"production's")
    s3.put_object(Bucket=BASE_BUCKET, Key="models/new.safetensors", Body=b"new")
    s3.delete_object(Bucket=BASE_BUCKET, Key="input/photo.png")
    expected = {
        "input/photo.png": "input/photo.png",
        "models/model.safetensors": "models/model.safetensors",
        "models/own.safetensors": "production's",
        "models/new.safetensors": "new",
        "output/job/result.json": "production's",
    }
    ran = bundle.run_function("ensure_bucket; copy_files no", "bucket")
    assert ran.returncode == 0
    assert "copied: 1\n" in ran.stdout
    assert aws.files(BUCKET) == expected
    bundle.run_function("ensure_bucket; copy_files yes", "bucket")  # --with-output
    assert aws.files(BUCKET) == expected | {"output/old.png": "output/old.png"}


def test_us_east_1_needs_no_location(bundle: Bundle, aws: Aws) -> None:
    bundle.set(REGION="us-east-1")
    aws.make_bucket(f"simple-comfy-{ACCOUNT_ID}-us-east-1-base", "us-east-1")
    ran = bundle.run_function("ensure_bucket; copy_files no", "bucket")
    assert (ran.returncode, ran.stderr) == (0, "")
    bucket = f"simple-comfy-{ACCOUNT_ID}-us-east-1-pro"
    assert aws.client("s3", "us-east-1").get_bucket_location(Bucket=bucket)["LocationConstraint"] is None


def test_a_bucket_with_files_of_unknown_origin_is_used_but_not_claimed(bundle: Bundle, aws: Aws) -> None:
    aws.make_bucket(BUCKET, files=("company.txt",))
    aws.make_bucket(BASE_BUCKET, files=())
    before = aws.everything("pro")
    ran = bundle.run_function("ensure_bucket no", "bucket")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "delete_env.sh will leave it alone" in ran.stdout
    assert bundle.run_function("bucket_owner", "bucket").stdout == "None"
    assert aws.everything("pro") == before, "its settings are somebody else's"


def test_what_somebody_has_set_on_our_bucket_stays(bundle: Bundle, aws: Aws) -> None:
    s3 = aws.client("s3")
    aws.make_bucket(BASE_BUCKET, files=())
    aws.make_bucket(BUCKET, tag="pro", files=())
    rule = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "output/"}, "Expiration": {"Days": 30}}
    s3.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration={"Rules": [rule]})
    queue = {"QueueArn": f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:any", "Events": ["s3:ObjectCreated:*"]}
    aws.client("sqs").create_queue(QueueName="any")
    s3.put_bucket_notification_configuration(
        Bucket=BUCKET, NotificationConfiguration={"QueueConfigurations": [queue]}
    )
    ran = bundle.run_function("ensure_bucket no; ensure_bucket no", "bucket")
    assert (ran.returncode, ran.stderr) == (0, "")
    states = [line.split(maxsplit=2)[2] for line in ran.stdout.splitlines() if line.startswith("bucket")]
    assert states == ["updated", "already there"]
    found = aws.everything("pro")
    assert found["bucket events"] == {"QueueConfigurations"}
    assert [rule["ID"] for rule in found["bucket lifecycle"]] == ["theirs"]
    check_only_tls(found["bucket policy"], [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"])


def test_an_empty_bucket_is_claimed(bundle: Bundle, aws: Aws) -> None:
    aws.make_bucket(BUCKET, files=())  # an earlier run was stopped before it could tag it
    assert bundle.run_function("claim_bucket None; bucket_owner", "bucket").stdout == "pro"


def test_a_bucket_of_another_environment_is_refused(bundle: Bundle, aws: Aws) -> None:
    aws.make_bucket(BUCKET, tag="test")
    ran = bundle.run_function("ensure_bucket; copy_files no", "bucket")
    assert ran.returncode == 1
    assert f"the bucket {BUCKET} belongs to the environment test: write S3_BUCKET with ${{ENV}}" in ran.stderr
