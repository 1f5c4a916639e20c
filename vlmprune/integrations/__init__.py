"""vlmprune inside other software: one folder each, which imports its host only when the host asks for it."""
