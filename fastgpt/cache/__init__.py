"""KV caches: keys and values of past tokens, so that a step computes those of new tokens only.

One cache serves all layers of a decoder. In each forward pass the decoder calls `extend` once, which returns the positions of
the new tokens, and then `attend` in each layer, which stores the new keys and values and computes attention over all that are
stored. The kinds differ in where they store:

    ContiguousCache   one tensor with room for `capacity` tokens of each sequence
    SlidingCache      a ring buffer of the last `window` tokens, in layers with a window
    PagedCache        pages from a pool, taken as sequences grow; sequences with a common prefix share pages
    Uncached          nowhere: attention over the tokens of the call

Sequences of a batch may differ in length: the new tokens of a pass are then padded on the left.

No gradients flow through stored keys and values. After a forward pass with a cache, the backward pass raises RuntimeError;
forward-mode derivatives and transforms of torch.func raise it immediately.
"""
