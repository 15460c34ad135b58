"""Tensor models behind the Open Inference Protocol (KServe v2) over HTTP."""
