"""The loopback Hub: see `hub.server`."""

from hub.server import LoopbackHub as LoopbackHub
