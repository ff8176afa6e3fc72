"""The mathematics below everything: decompositions and products, and the fused autograd function."""
