"""Devices in child processes. Messages between processes have fixed layouts; nothing is pickled.

On one host: job.py: what a process loads. messages.py: steps and results as bytes. board.py: shared memory for a
message. forkserver.py: starts processes. child.py: their main loop. kept.py: memory that outlives them. group.py: the
group of processes as one Executable. posted.py: its base class, and that of hosts.py.

On several hosts: hosts.py: the coordinator. agent.py: the agent of a host. membership.py: what both decide.
connections.py and address.py: authenticated connections. link.py and beacon.py: frames and heartbeats.
"""

from intaglio.devices.processes.forkserver import ForkServer, child_environment
from intaglio.devices.processes.group import GroupExecutable, RankStart
from intaglio.devices.processes.job import Job

__all__ = ["ForkServer", "GroupExecutable", "Job", "RankStart", "child_environment"]
