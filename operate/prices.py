"""What an instance's hour costs."""

from __future__ import annotations

PRICES_USD_H = {
    "g4dn.xlarge": 0.526, "g4dn.2xlarge": 0.752, "g4dn.4xlarge": 1.204, "g4dn.8xlarge": 2.176,
    "g5.xlarge": 1.006, "g5.2xlarge": 1.212, "g5.4xlarge": 1.624, "g5.8xlarge": 2.448,
    "g6.xlarge": 0.8048, "g6.2xlarge": 0.9776, "g6.4xlarge": 1.3232, "g6.8xlarge": 2.0144,
    "g6e.xlarge": 1.861, "g6e.2xlarge": 2.24208, "g6e.4xlarge": 3.00424, "g6e.8xlarge": 4.52856,
}  # fmt: skip
"""On demand, Linux, shared tenancy, alike in PRICE_REGIONS: AWS's public price list (AmazonEC2), as copies of it had
them for us-east-1 on 2026-09-24 and for us-west-2 on 2025-11-30."""
PRICE_REGIONS = ("us-east-1", "us-west-2")


def price_of(instance_type: str, region: str) -> float | None:
    """USD per hour on demand; None where it is not known."""
    return PRICES_USD_H.get(instance_type) if region in PRICE_REGIONS else None
