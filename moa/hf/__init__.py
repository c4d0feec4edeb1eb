"""The Hugging Face wrapper: run a transformers model under a plan, reversibly."""

from moa.hf.apply import Attachment, apply
from moa.hf.cache import MoaCache
from moa.hf.shape import check_plan, fingerprint, model_shape

__all__ = ["Attachment", "MoaCache", "apply", "check_plan", "fingerprint", "model_shape"]
