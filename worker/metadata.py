"""What EC2 says of the instance this runs on."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress


class MetadataError(Exception):
    """The instance metadata service does not answer: this is no EC2 instance, or access is off."""


class Metadata:
    """The instance metadata service, IMDSv2 only. AWS_EC2_METADATA_SERVICE_ENDPOINT moves it."""

    def __init__(self) -> None:
        endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
        self.endpoint = endpoint.rstrip("/")
        self._token = ""

    def get(self, path: str) -> str | None:
        """The text at `path` below /latest/meta-data/, None where there is nothing. Raises MetadataError."""
        return self._get(f"/latest/meta-data/{path}")

    def user_data(self) -> str | None:
        """What the instance was launched with, None where that is nothing. Raises MetadataError."""
        return self._get("/latest/user-data")

    def _get(self, path: str) -> str | None:
        for _ in range(2):
            if not self._token:
                headers = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
                self._token = self._request("PUT", "/latest/api/token", headers) or ""
            try:
                return self._request("GET", path, {"X-aws-ec2-metadata-token": self._token})
            except PermissionError:
                self._token = ""  # it has expired
        raise MetadataError("the instance metadata service refuses its own token")

    def _request(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        import urllib.error
        import urllib.request

        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by way of a proxy
        request = urllib.request.Request(self.endpoint + path, method=method, headers=dict(headers))
        try:
            with opener.open(request, timeout=2) as answer:
                return str(answer.read().decode(errors="replace"))  # user data may be binary
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            if error.code == 401:
                raise PermissionError from error
            raise MetadataError(f"the instance metadata service answers HTTP {error.code} to {path}") from error
        except OSError as error:
            raise MetadataError(
                f"the instance metadata service does not answer on {self.endpoint}: {error}"
            ) from error


def instance_id_of(metadata: Metadata) -> str:
    """This instance's id; the host's name where there is no metadata service."""
    with suppress(MetadataError):
        instance_id = metadata.get("instance-id")
        if instance_id:
            return instance_id
    return socket.gethostname()


def instance_type_of(metadata: Metadata) -> str | None:
    """This instance's type; None where there is no metadata service."""
    with suppress(MetadataError):
        return metadata.get("instance-type")
    return None
