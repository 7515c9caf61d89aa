"""Registers of a Hopper multiprocessor, shared out among Gluon programs whose warps have roles."""

_OF_MULTIPROCESSOR = 1 << 16
_LOADER = 24  # per thread of a warp that only loads
_WARPGROUP = 128  # threads; registers move by whole warpgroups


def registers(computing: int, programs: int, *, loader: bool) -> tuple[int, int]:
    """Per thread: at launch, and of a computing warpgroup once a loader has given up its own.

    Args:
        computing: threads of one program that compute, whole warpgroups.
        programs: that share one multiprocessor.
        loader: whether a warp beside them only loads.
    """
    loading = _WARPGROUP * loader
    at_launch = min(255, _OF_MULTIPROCESSOR // programs // (computing + loading) // 8 * 8)
    left = at_launch * (computing + loading) - _LOADER * loading
    return at_launch, min(240, left // computing // 8 * 8)
