from .backbones import load as load
from .evaluation.evaluate import evaluate as evaluate
from .exports import export as export
from .methods.open_vocabulary import label as label
from .methods.options import LabelOptions as LabelOptions, Options as Options
from .methods.seg4diff import segment as segment
from .methods.stages.label_map import label_map as label_map
from .methods.stages.proposals import merge as merge
from .methods.stages.token_maps import token_maps as token_maps
from .version import __version__ as __version__
