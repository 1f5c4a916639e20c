"""SGL: a small model answers first; what it looked at guides the pruning of a large one, which a sure answer leaves out.

"A Stitch in Time Saves Nine: Small VLM is a Precise Guidance for Accelerating Large VLMs" (CVPR 2025, arXiv 2412.03324).
"""

from vlmprune.guidance.first import First, answer_first, consistency
from vlmprune.guidance.scores import Guidance
from vlmprune.guidance.stitch import Answer, Stitch

__all__ = ["Answer", "First", "Guidance", "Stitch", "answer_first", "consistency"]
