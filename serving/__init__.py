"""Serves a SynapseModel and shows what happens inside while it writes."""
