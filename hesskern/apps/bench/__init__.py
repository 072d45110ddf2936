"""The benchmark behind ``hesskern bench``: side by side with autograd and with other packages.

``settings`` -> ``cases`` (networks and data) -> ``contenders`` and ``peers`` (what is compared) ->
``factors``, ``lm`` (with ``language`` and ``lm_peers``), ``matvec``, ``eigen``, ``kron``,
``kernels`` (one suite each) -> ``runner`` (timing) and ``memory`` (peak memory in a process of its
own) -> ``report`` and ``command``.
"""
