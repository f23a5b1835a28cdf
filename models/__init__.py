"""Vision Transformers in PyTorch, exact to Google's JAX code, and their `.npz` files."""

import torch

# Products of float32 are float32's unless the user says otherwise; cuDNN's convolutions alone would
# round to TF32.
torch.backends.cudnn.allow_tf32 = False
