"""KV caches: keys and values of past tokens, so that a step computes only its new ones.

A cache serves all layers of a decoder. In each forward pass the decoder calls `extend` once, for the positions of the new
tokens, and then in each layer `attend`, which stores the layer's new keys and values and attends over all that the cache
holds. Kinds differ in where they store:

    ContiguousCache   room for `capacity` tokens for each sequence, allocated at once
    SlidingCache      a ring of the last `window` tokens, in layers that have a window
    PagedCache        pages of a pool, taken as sequences grow, and shared by sequences that begin alike
    Uncached          nowhere: attention over the tokens of the call alone

Sequences of a batch may differ in length: the new tokens of a pass are then padded on the left.

No derivatives flow through what is stored: the backward pass after a forward pass with a cache raises RuntimeError, and so do
forward-mode derivatives and transforms of torch.func at once.
"""
