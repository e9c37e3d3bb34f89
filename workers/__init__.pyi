# The public names of this package, one line each: each is imported when it is first used.

from .models.description import ModelDescription as ModelDescription
from .models.description import describe_model as describe_model
from .models.footprint import estimate_bytes as estimate_bytes
from .models.loading import LoadedModel as LoadedModel
from .models.loading import load_model as load_model
from .models.saving import quantize_checkpoint as quantize_checkpoint
from .notebook import capture_texts as capture_texts
from .text.tokenizer import TextTokenizer as TextTokenizer
from .text.tokenizer import load_tokenizer as load_tokenizer
from .tiny import tiny_checkpoint as tiny_checkpoint
