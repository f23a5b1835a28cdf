"""One thread a process: tests run side by side, and tiny models gain nothing from more.

On a CPU, whatever else is here: bits are compared, and several processes want a device each.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for every process started
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("PYTHONUNBUFFERED", None)  # most users have it not
