"""Segmentation networks trained with the loss: data sets, objective, metrics, the paper's protocol.

Needs the packages of the extra `fdkernels[train]`; `segmentation.demo` those of `fdkernels[demo]`.
"""
