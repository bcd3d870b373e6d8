"""Passes over the joint forward-backward graph. One file per pass, named after it; ``pipeline.py`` is their order."""

if __name__ != "gradprune.passes":
    # Imported as a top-level package its registries would exist twice, and a rule registered in one would be missing
    # from the other.
    raise ImportError(f"import gradprune.passes, not {__name__}: the folder is part of the gradprune package")
