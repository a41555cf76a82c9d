"""Jupyter's kernel, as a process that a test starts."""

from __future__ import annotations

from ipykernel.kernelapp import IPKernelApp


def run_kernel(connection_file: str) -> None:
    IPKernelApp.launch_instance(argv=['-f', connection_file])
