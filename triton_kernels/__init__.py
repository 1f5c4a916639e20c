"""Triton kernels, one family a file. Import as vlmprune.triton_kernels, never as triton_kernels."""

if __name__ != "vlmprune.triton_kernels":
    raise ImportError(
        f"this folder is vlmprune's kernel source, imported as {__name__!r}; import vlmprune.triton_kernels. "
        "If you wanted OpenAI's triton_kernels, keep the checkout off sys.path (PYTHONSAFEPATH=1)."
    )
