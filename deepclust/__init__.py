"""Deep image clustering: many methods under one protocol.

Shapes are written with these letters everywhere: N images of a batch, M images of a data set, V views, D features,
K clusters, C classes (beside H, W: channels), H and W pixels.
"""

__version__ = "0.1.0"
