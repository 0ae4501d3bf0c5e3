"""The fixtures of all tests of provision/: the local cloud, and a folder with the scripts."""

from __future__ import annotations

from aws_fixtures import aws, aws_server, bundle

__all__ = ["aws", "aws_server", "bundle"]
