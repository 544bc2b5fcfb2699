"""/api/introspect: what happened inside while a request was served, kept, shown, explained and changed.

store, record, columns   traces as they grow, bounded in tokens, bytes and time
view, schema, events     one trace as JSON, as safetensors and while it grows
interventions            changes that a client asks for, checked
run, replay              a prompt run and traced; a traced run once more, from the snapshot it started from
sources, diff            what a memory read is made of; what an intervention changes, against random ones
pathways, card           what fired together; the model, what it can do and what it has done
bodies, router           the routes
"""
