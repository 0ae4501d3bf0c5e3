"""A fleet that looks like one ComfyUI: what stands behind `fleet.py serve`.

`jobs.py` knows jobs and `files.py` knows files; each protocol is a room of its own that stands on them.
"""
