from .backbones import load as load
from .evaluation.comparison import compare as compare
from .evaluation.evaluate import evaluate as evaluate
from .exports import export as export
from .integrations.pipeline import pipeline as pipeline
from .methods.concepts import ConceptOptions as ConceptOptions
from .methods.diffcut import DiffCutOptions as DiffCutOptions
from .methods.diffseg import DiffSegOptions as DiffSegOptions
from .methods.diffseg_names import DiffSegNamesOptions as DiffSegNamesOptions
from .methods.goca import GocaOptions as GocaOptions
from .methods.open_vocabulary import LabelOptions as LabelOptions, label as label
from .methods.seg4diff import Options as Options, regions as regions, segment as segment, token_maps as token_maps
from .methods.stages.labels import label_map as label_map
from .methods.stages.proposals import merge as merge
from .version import __version__ as __version__
