"""Pruning methods: tensors in, kept positions out. One short file each in ``methods``; ``registry`` knows their names.

Every built-in method's class is an attribute of this package (and of ``vlmprune``); what the author of a method needs is
here too.
"""

import inspect

from vlmprune.policies.base import AttentionInputs as AttentionInputs
from vlmprune.policies.base import Grid as Grid
from vlmprune.policies.base import Insertion as Insertion
from vlmprune.policies.base import Needs as Needs
from vlmprune.policies.base import PruningPolicy as PruningPolicy
from vlmprune.policies.base import Ranking as Ranking
from vlmprune.policies.base import Reduction as Reduction
from vlmprune.policies.base import TokenContext as TokenContext
from vlmprune.policies.base import VisionAttention as VisionAttention
from vlmprune.policies.base import outcome as outcome
from vlmprune.policies.by_image import ranked as ranked
from vlmprune.policies.by_image import spent as spent
from vlmprune.policies.checks import check_keep as check_keep
from vlmprune.policies.checks import check_layer as check_layer
from vlmprune.policies.checks import check_layers as check_layers
from vlmprune.policies.checks import check_whole as check_whole
from vlmprune.policies.checks import check_word as check_word
from vlmprune.policies.choose import index_of as index_of
from vlmprune.policies.choose import marks as marks
from vlmprune.policies.choose import quotas as quotas
from vlmprune.policies.choose import select_counts as select_counts
from vlmprune.policies.choose import select_scores as select_scores
from vlmprune.policies.compose import Intersection as Intersection
from vlmprune.policies.compose import Stages as Stages
from vlmprune.policies.compose import Union as Union
from vlmprune.policies.counts import keep_count as keep_count
from vlmprune.policies.crops import crops_of as crops_of
from vlmprune.policies.crops import images_of as images_of
from vlmprune.policies.custom import Custom as Custom
from vlmprune.policies.glance import GlanceScorer as GlanceScorer
from vlmprune.policies.layer_shares import g_search as g_search
from vlmprune.policies.layer_shares import p_sigmoid as p_sigmoid
from vlmprune.policies.layer_shares import scheduled as scheduled
from vlmprune.policies.methods.accm import ACCM as ACCM
from vlmprune.policies.methods.accm_selection import ACCMSelection as ACCMSelection
from vlmprune.policies.methods.agilepruner import AgilePruner as AgilePruner
from vlmprune.policies.methods.aim import AIM as AIM
from vlmprune.policies.methods.cdpruner import CDPruner as CDPruner
from vlmprune.policies.methods.dart import DART as DART
from vlmprune.policies.methods.divprune import DivPrune as DivPrune
from vlmprune.policies.methods.dycoke import DyCoke as DyCoke
from vlmprune.policies.methods.evs import EVS as EVS
from vlmprune.policies.methods.fastervlm import FasterVLM as FasterVLM
from vlmprune.policies.methods.fastv import FastV as FastV
from vlmprune.policies.methods.fastvid import FastVID as FastVID
from vlmprune.policies.methods.feather import Feather as Feather
from vlmprune.policies.methods.ficoco import FiCoCo as FiCoCo
from vlmprune.policies.methods.fitprune import FitPrune as FitPrune
from vlmprune.policies.methods.flashvid import FlashVID as FlashVID
from vlmprune.policies.methods.flowcut import FlowCut as FlowCut
from vlmprune.policies.methods.folder import Folder as Folder
from vlmprune.policies.methods.globalcom2 import GlobalCom2 as GlobalCom2
from vlmprune.policies.methods.greedyprune import GreedyPrune as GreedyPrune
from vlmprune.policies.methods.hiprune import HiPrune as HiPrune
from vlmprune.policies.methods.hired import HiRED as HiRED
from vlmprune.policies.methods.holitom import HoliTom as HoliTom
from vlmprune.policies.methods.holov import HoloV as HoloV
from vlmprune.policies.methods.knorm import KNorm as KNorm
from vlmprune.policies.methods.learned import Learned as Learned
from vlmprune.policies.methods.lvlm_csp import LVLMCSP as LVLMCSP
from vlmprune.policies.methods.mmtok import MMTok as MMTok
from vlmprune.policies.methods.mustdrop import MustDrop as MustDrop
from vlmprune.policies.methods.priortr import PriorTR as PriorTR
from vlmprune.policies.methods.prumerge import PruMerge as PruMerge
from vlmprune.policies.methods.prunesid import PruneSID as PruneSID
from vlmprune.policies.methods.prunevid import PruneVid as PruneVid
from vlmprune.policies.methods.pyramiddrop import PyramidDrop as PyramidDrop
from vlmprune.policies.methods.random import Random as Random
from vlmprune.policies.methods.random_deep import RandomDeep as RandomDeep
from vlmprune.policies.methods.scope import SCOPE as SCOPE
from vlmprune.policies.methods.scout import Scout as Scout
from vlmprune.policies.methods.sgl import SGL as SGL
from vlmprune.policies.methods.sparsevlm import SparseVLM as SparseVLM
from vlmprune.policies.methods.sparsevlm_plus import SparseVLMPlus as SparseVLMPlus
from vlmprune.policies.methods.star import STAR as STAR
from vlmprune.policies.methods.tome import ToMe as ToMe
from vlmprune.policies.methods.trim import TRIM as TRIM
from vlmprune.policies.methods.uniform import Uniform as Uniform
from vlmprune.policies.methods.v2drop import V2Drop as V2Drop
from vlmprune.policies.methods.vidcom2 import VidCom2 as VidCom2
from vlmprune.policies.methods.visiontrim import VisionTrim as VisionTrim
from vlmprune.policies.methods.visionzip import VisionZip as VisionZip
from vlmprune.policies.methods.vispruner import VisPruner as VisPruner
from vlmprune.policies.methods.vscan import VScan as VScan
from vlmprune.policies.methods.vtw import VTW as VTW
from vlmprune.policies.methods.zoo_prune import ZOOPrune as ZOOPrune
from vlmprune.policies.recipe import policy_from as policy_from
from vlmprune.policies.registry import list_policies as list_policies
from vlmprune.policies.schedule import keep_for_flops as keep_for_flops
from vlmprune.policies.schedule import keep_for_mean_tokens as keep_for_mean_tokens
from vlmprune.policies.scorer import Scorer as Scorer
from vlmprune.policies.sinks import WithoutSinks as WithoutSinks

__all__ = sorted(name for name, found in globals().items() if name[0] != "_" and not inspect.ismodule(found))
