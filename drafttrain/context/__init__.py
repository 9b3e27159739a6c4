"""Draft-based approximate inference: a long prompt is cut down to what matters, as a drafter that looked ahead says.

This is the one part of drafttrain whose text may differ from the target's. KV dropping reads the whole prompt and keeps
a part of its keys; prompt compression reads a part of the prompt. Everything here is called approximate where it shows.
"""
