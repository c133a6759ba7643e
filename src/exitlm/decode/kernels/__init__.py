"""The model as it is run while decoding: packed formats, fused layers, static shapes, and the runner of passes."""
