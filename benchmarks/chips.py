"""Peak rates of accelerators, to state a measured rate as a share of them."""

import dataclasses

from balcap_jax.cli.errors import UserError


@dataclasses.dataclass(frozen=True)
class Peak:
    """Of one device, by its vendor's data sheet. flops: dense bfloat16, per second. bandwidth: of memory, bytes/s."""

    flops: float
    bandwidth: float


# By what `device_kind` holds; the first that fits counts. T4 has no bfloat16 units: its figure is that of float16.
PEAKS = {
    "H200": Peak(989e12, 4.8e12),
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100": Peak(989e12, 3.35e12),
    "A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "A100 80GB": Peak(312e12, 1.935e12),
    "A100": Peak(312e12, 1.555e12),
    "L40S": Peak(362e12, 0.864e12),
    "L4": Peak(121e12, 0.3e12),
    "A10": Peak(125e12, 0.6e12),
    "T4": Peak(65e12, 0.32e12),
    "TPU v4": Peak(275e12, 1.228e12),
    "TPU v5 lite": Peak(197e12, 0.819e12),
    "TPU v5": Peak(459e12, 2.765e12),
    "TPU v6 lite": Peak(918e12, 1.64e12),
}


def peak_of(kind: str, flops: float = 0.0, bandwidth: float = 0.0) -> Peak | None:
    """The peak of the device kind, with `flops` and `bandwidth` in place of the table's where they are not 0.

    None: the kind is not in the table, and the two are not both given.

    Raises:
      UserError: a given value is negative.
    """
    for name, value in (("peak_flops", flops), ("bandwidth", bandwidth)):
        if value < 0:
            raise UserError(f"--{name} is the rate of one device per second, above 0, got {value:g}")
    known = next((peak for name, peak in PEAKS.items() if name in kind), None)
    if known is None:
        return Peak(flops, bandwidth) if flops and bandwidth else None
    return Peak(flops or known.flops, bandwidth or known.bandwidth)
