"""Causal attention within documents in Triton, forward and backward, and nothing around it.

The documents of a block lie one after another, so a tile of queries reads one range of keys, and a
tile of keys is read by one range of queries: two numbers per token say all that a mask would. Tiles
of scores that lie in one document and below the diagonal are computed without a mask.

Every sum has one order, so the same inputs give the same bits. Without atomics, scores are made for
the gradients by keys and values, and again for the one by queries: 7 products instead of 5.

Launched by attention_launch.py, which has the shapes; the reference is attention.py's.
"""

import triton
import triton.language as tl

# Programs of so many rows (heads of blocks) run side by side, the heaviest tiles of all of them
# first: what they read stays in the L2 cache. A row of keys is read with all its query heads.
QUERY_ROWS = tl.constexpr(64)
KEY_ROWS = tl.constexpr(16)
LOG2_E = tl.constexpr(1.4426950408889634)

# A kernel is not compiled anew for each number of blocks or heads.
COUNTS = ("num_rows", "num_heads", "group", "num_blocks", "num_key_heads", "parts")


@triton.constexpr_function  # type: ignore[untyped-decorator]
def padded(width: int) -> int:
    """A power of two, as tiles need, and no less than a tensor core multiplies."""
    return max(16, 1 << (width - 1).bit_length())


@triton.jit(do_not_specialize=COUNTS)  # type: ignore[untyped-decorator]
def forward(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    extents,
    output,
    normaliser,
    query_strides,
    key_strides,
    value_strides,
    num_rows,
    num_heads,
    group,
    length,
    scale,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    row, tile = _place(tl.program_id(0), num_rows, tl.cdiv(length, OWN), QUERY_ROWS)
    first_query = (tl.cdiv(length, OWN) - 1 - tile) * OWN  # the last ones read the most keys
    block, head = (row // num_heads).to(tl.int64), row % num_heads
    query += block * query_strides[0] + head * query_strides[1]
    key += block * key_strides[0] + head // group * key_strides[1]
    value += block * value_strides[0] + head // group * value_strides[1]
    starts = extents + block * length
    tokens = first_query + tl.arange(0, OWN)
    document = tl.load(starts + tokens, mask=tokens < length, other=0)
    q = _rows(query, tokens, query_strides[2], length, WIDTH, True)
    first, whole, after, last = _keys_read(starts, first_query, length, OWN, OTHER)
    highest = tl.full([OWN], -float("inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    mean = tl.zeros([OWN, padded(WIDTH)], tl.float32)
    for masked in tl.static_range(2):
        begin = first if masked else whole
        count = (last - after + whole - first if masked else after - whole) // OTHER
        for number in range(count):
            start = begin + number * OTHER
            if masked:
                start += tl.where(start < whole, 0, after - whole)
            keys = start + tl.arange(0, OTHER)
            k = _rows(key, keys, key_strides[2], length, WIDTH, masked)
            scores = tl.dot(q, tl.trans(k))
            if masked:
                seen = (keys[None, :] >= document[:, None]) & (keys[None, :] <= tokens[:, None])
                scores = tl.where(seen, scores, -float("inf"))
            new = tl.maximum(highest, tl.max(scores, 1) * (scale * LOG2_E))
            base = tl.where(new == -float("inf"), 0.0, new) if masked else new  # no key seen yet
            weights = tl.exp2(scores * (scale * LOG2_E) - base[:, None])
            shrink = tl.exp2(highest - base)
            total = total * shrink + tl.sum(weights, 1)
            v = _rows(value, keys, value_strides[2], length, WIDTH, masked)
            mean = tl.dot(weights.to(v.dtype), v, mean * shrink[:, None])
            highest = new
    output += (block * length * num_heads + head) * WIDTH
    _store_rows(output, mean / total[:, None], tokens, num_heads * WIDTH, length, WIDTH)
    at = normaliser + row.to(tl.int64) * length + tokens
    tl.store(at, highest + tl.log2(total), mask=tokens < length)


@triton.jit(do_not_specialize=COUNTS)  # type: ignore[untyped-decorator]
def backward(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    extents,
    gradient,
    normaliser,
    delta,
    by_query,
    by_key,
    by_value,
    query_strides,
    key_strides,
    value_strides,
    num_blocks,
    num_heads,
    num_key_heads,
    parts,
    length,
    scale,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    num_by_keys = num_blocks * num_key_heads * parts * tl.cdiv(length, OWN)
    program = tl.program_id(0)
    if program < num_by_keys:
        _gradients_by_keys(
            program,
            query,
            key,
            value,
            extents,
            gradient,
            normaliser,
            delta,
            by_key,
            by_value,
            query_strides,
            key_strides,
            value_strides,
            num_blocks,
            num_heads,
            num_key_heads,
            parts,
            length,
            scale,
            WIDTH,
            OWN,
            OTHER,
        )
    else:
        _gradient_by_queries(
            program - num_by_keys,
            query,
            key,
            value,
            extents,
            gradient,
            normaliser,
            delta,
            by_query,
            query_strides,
            key_strides,
            value_strides,
            num_blocks,
            num_heads,
            num_key_heads,
            length,
            scale,
            WIDTH,
            OWN,
            OTHER,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _gradients_by_keys(  # type: ignore[no-untyped-def]
    program,
    query,
    key,
    value,
    extents,
    gradient,
    normaliser,
    delta,
    by_key,
    by_value,
    query_strides,
    key_strides,
    value_strides,
    num_blocks,
    num_heads,
    num_key_heads,
    parts,
    length,
    scale,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    num_rows = num_blocks * num_key_heads * parts
    row, tile = _place(program, num_rows, tl.cdiv(length, OWN), KEY_ROWS)
    part, key_head = row % parts, row // parts % num_key_heads
    block = (row // (parts * num_key_heads)).to(tl.int64)
    heads = num_heads // num_key_heads // parts
    head = (key_head * parts + part) * heads  # the first of its own
    query += block * query_strides[0] + head * query_strides[1]
    key += block * key_strides[0] + key_head * key_strides[1]
    value += block * value_strides[0] + key_head * value_strides[1]
    gradient += (block * length * num_heads + head) * WIDTH
    normaliser += (block * num_heads + head) * length
    delta += (block * num_heads + head) * length
    place = ((part * num_blocks + block) * length * num_key_heads + key_head) * WIDTH
    ends = extents + (num_blocks + block) * length
    first_key = tile * OWN  # the first ones are read by the most queries
    keys = first_key + tl.arange(0, OWN)
    document_end = tl.load(ends + keys, mask=keys < length, other=0)
    k = _rows(key, keys, key_strides[2], length, WIDTH, True)
    v = _rows(value, keys, value_strides[2], length, WIDTH, True)
    first, whole, after, last = _queries_reading(ends, first_key, length, OWN, OTHER)
    dk = tl.zeros([OWN, padded(WIDTH)], tl.float32)
    dv = tl.zeros([OWN, padded(WIDTH)], tl.float32)
    for masked in tl.static_range(2):
        begin = first if masked else whole
        count = (last - after + whole - first if masked else after - whole) // OTHER
        for number in range(count * heads):
            head = number // tl.maximum(count, 1)  # a pipeline divides before it looks
            start = begin + (number - head * count) * OTHER
            if masked:
                start += tl.where(start < whole, 0, after - whole)
            tokens = start + tl.arange(0, OTHER)
            at = query + head * query_strides[1]
            q = _rows(at, tokens, query_strides[2], length, WIDTH, masked)
            weights = tl.exp2(
                tl.dot(k, tl.trans(q)) * (scale * LOG2_E)
                - _numbers(normaliser + head * length, tokens, length, masked)[None, :]
            )
            if masked:
                seen = tokens[None, :] >= keys[:, None]
                seen &= tokens[None, :] < document_end[:, None]
                weights = tl.where(seen, weights, 0.0)
            at = gradient + head * WIDTH
            do = _rows(at, tokens, num_heads * WIDTH, length, WIDTH, masked)
            dv = tl.dot(weights.to(do.dtype), do, dv)
            by_weight = tl.dot(v, tl.trans(do))
            by_weight -= _numbers(delta + head * length, tokens, length, masked)[None, :]
            dk = tl.dot((weights * by_weight).to(q.dtype), q, dk)
    stride = num_key_heads * WIDTH
    _store_rows(by_key + place, dk * scale, keys, stride, length, WIDTH)
    _store_rows(by_value + place, dv, keys, stride, length, WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_by_queries(  # type: ignore[no-untyped-def]
    program,
    query,
    key,
    value,
    extents,
    gradient,
    normaliser,
    delta,
    by_query,
    query_strides,
    key_strides,
    value_strides,
    num_blocks,
    num_heads,
    num_key_heads,
    length,
    scale,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    num_tiles = tl.cdiv(length, OWN)
    row, tile = _place(program, num_blocks * num_heads, num_tiles, QUERY_ROWS)
    block, head = (row // num_heads).to(tl.int64), row % num_heads
    key_head = head // (num_heads // num_key_heads)
    query += block * query_strides[0] + head * query_strides[1]
    key += block * key_strides[0] + key_head * key_strides[1]
    value += block * value_strides[0] + key_head * value_strides[1]
    place = (block * length * num_heads + head) * WIDTH
    own_stride = num_heads * WIDTH
    starts = extents + block * length
    first_query = (num_tiles - 1 - tile) * OWN
    tokens = first_query + tl.arange(0, OWN)
    document = tl.load(starts + tokens, mask=tokens < length, other=0)
    q = _rows(query, tokens, query_strides[2], length, WIDTH, True)
    do = _rows(gradient + place, tokens, own_stride, length, WIDTH, True)
    normaliser = _numbers(normaliser + row.to(tl.int64) * length, tokens, length, True)
    delta = _numbers(delta + row.to(tl.int64) * length, tokens, length, True)
    first, whole, after, last = _keys_read(starts, first_query, length, OWN, OTHER)
    dq = tl.zeros([OWN, padded(WIDTH)], tl.float32)
    for masked in tl.static_range(2):
        begin = first if masked else whole
        count = (last - after + whole - first if masked else after - whole) // OTHER
        for number in range(count):
            start = begin + number * OTHER
            if masked:
                start += tl.where(start < whole, 0, after - whole)
            keys = start + tl.arange(0, OTHER)
            k = _rows(key, keys, key_strides[2], length, WIDTH, masked)
            scores = tl.dot(q, tl.trans(k)) * (scale * LOG2_E)
            weights = tl.exp2(scores - normaliser[:, None])
            if masked:
                seen = (keys[None, :] >= document[:, None]) & (keys[None, :] <= tokens[:, None])
                weights = tl.where(seen, weights, 0.0)
            v = _rows(value, keys, value_strides[2], length, WIDTH, masked)
            by_weight = tl.dot(do, tl.trans(v)) - delta[:, None]
            dq = tl.dot((weights * by_weight).to(k.dtype), k, dq)
    _store_rows(by_query + place, dq * scale, tokens, own_stride, length, WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def _place(program, num_rows, num_tiles, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's row and tile: of ROWS rows together, first all first tiles, then all second."""
    start = program // (ROWS * num_tiles) * ROWS
    together = tl.minimum(ROWS, num_rows - start)
    program -= start * num_tiles
    return start + program % together, program // together


@triton.jit  # type: ignore[untyped-decorator]
def _keys_read(starts, first_query, length, OWN: tl.constexpr, OTHER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a tile of queries: it reads keys from `first` to `last`, and all of its queries all of
    those from `whole` to `after`. All four are borders of tiles of keys."""
    end = tl.minimum(first_query + OWN, length)
    first = tl.load(starts + first_query) // OTHER * OTHER
    after = (first_query + 1) // OTHER * OTHER
    whole = tl.minimum(tl.cdiv(tl.load(starts + end - 1), OTHER) * OTHER, after)
    return first, whole, after, tl.cdiv(end, OTHER) * OTHER


@triton.jit  # type: ignore[untyped-decorator]
def _queries_reading(ends, first_key, length, OWN: tl.constexpr, OTHER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a tile of keys: queries from `first` to `last` read it, and all of those from `whole` to
    `after` all of its keys. All four are borders of tiles of queries."""
    end = tl.minimum(first_key + OWN, length)
    first = first_key // OTHER * OTHER
    last = tl.cdiv(tl.load(ends + end - 1), OTHER) * OTHER
    whole = tl.minimum(tl.cdiv(first_key + OWN - 1, OTHER) * OTHER, last)
    after = tl.maximum(tl.load(ends + first_key) // OTHER * OTHER, whole)
    return first, whole, after, last


@triton.jit  # type: ignore[untyped-decorator]
def _rows(  # type: ignore[no-untyped-def]
    of, rows, stride, length, WIDTH: tl.constexpr, PARTLY: tl.constexpr
):
    """[rows, padded], zero beyond the width and, where rows may lie beyond the length, there."""
    columns = tl.arange(0, padded(WIDTH))
    places = of + rows[:, None] * stride + columns[None, :]
    if PARTLY or padded(WIDTH) != WIDTH:
        inside = (rows[:, None] < length) & (columns[None, :] < WIDTH)
        return tl.load(places, mask=inside, other=0.0)
    else:
        return tl.load(places)


@triton.jit  # type: ignore[untyped-decorator]
def _numbers(of, rows, length, PARTLY: tl.constexpr):  # type: ignore[no-untyped-def]
    if PARTLY:
        return tl.load(of + rows, mask=rows < length, other=0.0)
    else:
        return tl.load(of + rows)


@triton.jit  # type: ignore[untyped-decorator]
def _store_rows(  # type: ignore[no-untyped-def]
    to, values, rows, stride, length, WIDTH: tl.constexpr
):
    columns = tl.arange(0, padded(WIDTH))
    inside = (rows[:, None] < length) & (columns[None, :] < WIDTH)
    places = to + rows[:, None] * stride + columns[None, :]
    tl.store(places, values.to(to.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def multiply_outputs(  # type: ignore[no-untyped-def]
    gradient,
    output,
    delta,
    num_heads,
    length,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(1)
    block, head = (row // num_heads).to(tl.int64), row % num_heads
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    place = (block * length * num_heads + head) * WIDTH
    stride = num_heads * WIDTH
    do = _rows(gradient + place, tokens, stride, length, WIDTH, True).to(tl.float32)
    o = _rows(output + place, tokens, stride, length, WIDTH, True).to(tl.float32)
    at = delta + row.to(tl.int64) * length + tokens
    tl.store(at, tl.sum(do * o, 1), mask=tokens < length)


@triton.jit  # type: ignore[untyped-decorator]
def add_parts(  # type: ignore[no-untyped-def]
    key_parts, value_parts, by_key, by_value, size, parts, BLOCK: tl.constexpr
):
    if tl.program_id(1) == 0:
        of, to = key_parts, by_key
    else:
        of, to = value_parts, by_value
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(of + part * size + at, mask=at < size, other=0.0)
    tl.store(to + at, total.to(to.dtype.element_ty), mask=at < size)
