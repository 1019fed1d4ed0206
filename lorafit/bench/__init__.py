"""Measures training on this machine, lorafit's and that of the tools users would pick instead.

Every measurement is a process of its own, a worker, so that memory and the allocator start afresh: `ours` and `peers`
train, `products` and `profile` look into a step of ours. `harness` runs the sides in turn, `cases` says what is compared,
`tables` shows it. What both sides train on is one `Work`, in token ids: neither can count or learn anything else.
"""
