"""What a model does with its layers, as far as it can be known: by its classes, its graph, and a run of it.

`wrapping` asks these modules where quantizers belong and what may be folded; what none of them can tell is left as it
is, with its reason in `describe`.

What a module is, and who else knows it:

``overrides``
    Does a module do what PyTorch's own class does?
``surroundings``, ``aliases``, ``writes``
    Who else reads, calls or writes a layer's parameters?

What follows what:

``tracing``
    The graph of a model that `torch.fx` can follow.
``observing``
    What a run of any model shows (``wrap(model, recipe, example=batch)``).
``operands``, ``dataflow``
    What an operation works on, and where a layer's channels are after operations that only move values.
``origins``
    From which quantizer a layer's input comes.

What is made of it:

``folding``
    Batch norms go into the layers before them.
``computed``
    Is a quantized weight used as it is, or is something else computed of it first?
``routes``
    Which inputs get a quantizer, and whose scale a bias follows.
``operations``
    Quantizers around functional operations of models that can't be traced.
"""
