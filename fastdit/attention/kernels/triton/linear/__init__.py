"""The kernels of SLA's linear attention."""
