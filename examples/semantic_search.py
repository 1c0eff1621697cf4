"""Find the lines of a text that mean what you ask, with a compiled MiniLM sentence encoder. Runs offline.

    python examples/semantic_search.py [TEXT_FILE] [--query "..."]
"""
