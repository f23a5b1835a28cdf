"""Vision Transformers in PyTorch, exact to Google's JAX code, and their checkpoint files."""

import torch

# float32 stays float32 unless the user says otherwise. Only cuDNN's convolutions would round it
# to TF32 by default.
torch.backends.cudnn.allow_tf32 = False

# PyTorch gives half-precision attention on Hopper GPUs to cuDNN, whose gradients have been NaN,
# for a single query for example: NVIDIA/cudnn-frontend issue 1072, pytorch/pytorch issue 196678.
torch.backends.cuda.enable_cudnn_sdp(False)
