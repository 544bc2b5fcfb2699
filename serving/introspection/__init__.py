"""/api/introspect: what happened inside while a request was served, kept, shown, explained and changed.

store, record   traces as they grow, bounded in tokens, bytes and time
view, schema    one trace as JSON and safetensors, and what that JSON looks like
interventions   changes that a client asks for, checked
replay          a trace's run again, on the engine's thread, from the snapshot it started from
sources, diff   what a memory read is made of; what an intervention changes, against random ones
pathways, card  what fired together; the model, what it can do and what it has done
bodies, router  the routes
"""
