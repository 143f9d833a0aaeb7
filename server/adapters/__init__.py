"""Adapter methods. Adding one is a file beside these and a line in METHODS."""

from server.adapters.base import Method
from server.adapters.bitfit import Bitfit
from server.adapters.bottleneck import Bottleneck
from server.adapters.compacter import Compacter
from server.adapters.dora import Dora
from server.adapters.head_only import HeadOnly
from server.adapters.ia3 import Ia3
from server.adapters.invertible import Invertible
from server.adapters.ln_tuning import LnTuning
from server.adapters.loha import Loha
from server.adapters.lokr import Lokr
from server.adapters.lora import Lora
from server.adapters.p_tuning import PTuning
from server.adapters.post_encoder import PostEncoder
from server.adapters.prefix_tuning import PrefixTuning
from server.adapters.prompt_tuning import PromptTuning
from server.adapters.vera import Vera

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Lora(),
        Dora(),
        Vera(),
        Loha(),
        Lokr(),
        Ia3(),
        Bottleneck(),
        Compacter(),
        Invertible(),
        PostEncoder(),
        PrefixTuning(),
        PromptTuning(),
        PTuning(),
        LnTuning(),
        Bitfit(),
        HeadOnly(),
    )
}
