"""The kernels of linear attention, which SLA has beside its blocks."""
