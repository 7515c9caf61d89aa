"""How rows of channels are cut into tiles: blocks of rows and columns, powers of two both, as Triton has them."""

VALUES = 8  # a thread's share of a tile: 16 bytes of 16-bit elements, one load
_NARROWEST = 64  # columns: 128 bytes of 16-bit elements, a line of the cache
_MOST = 5  # tiles of a row: 320, 640 and 1280 channels need no padding, and all loads of a row fit a thread's registers


def row_tiles(columns: int) -> tuple[int, int]:
    """Columns of a tile, and tiles of a row, with the least padding: 320 gives (64, 5), 1024 (256, 4), 65 (64, 2)."""
    width = _NARROWEST
    while -(-columns // width) > _MOST:
        width *= 2
    widths = (width, 2 * width, 4 * width)  # from there on two tiles, then one
    width = min(widths, key=lambda width: -(-columns // width) * width)
    return width, -(-columns // width)


def tile_rows(width: int, num_warps: int) -> int:
    """Rows of a tile of which each thread loads one vector."""
    return max(1, 32 * num_warps * VALUES // width)


def block_width(columns: int) -> int:
    """Columns of a tile where a program need not have whole rows: the most, of at most 256, with the least padding."""
    return min((256, 128, _NARROWEST), key=lambda width: -(-columns // width) * width)
