from .aggregation import background_maps as background_maps, class_maps as class_maps, orders_of as orders_of
from .enlarging import upsample as upsample
from .forwards import batched as batched
from .labels import as_regions as as_regions, coarsened as coarsened, join_order as join_order, label_map as label_map
from .latents import (
    encode as encode,
    encode_levels as encode_levels,
    encode_steps as encode_steps,
    encode_without_noise as encode_without_noise,
)
from .prompts import checked_names as checked_names, prompts_of as prompts_of
from .proposals import merge as merge
from .runs import mean_inside as mean_inside, painted as painted, runs_of as runs_of
from .scores import (
    joined_maps as joined_maps,
    mean_of_steps as mean_of_steps,
    means as means,
    scale_scores as scale_scores,
    with_floor as with_floor,
)
from .superpixels import superpixels_of as superpixels_of
from .tiles import tiled_label_map as tiled_label_map, tiled_token_maps as tiled_token_maps
from .token_maps import latent_token_maps as latent_token_maps, maps_of_layers as maps_of_layers, read_prompt as read_prompt
