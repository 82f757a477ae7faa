"""Published models that an estimate needs no download for."""

from __future__ import annotations

from pathlib import Path

ARCHITECTURES = Path(__file__).parent / "architectures"
QWEN3_4B, QWEN3_8B = 4_022_468_096, 8_190_735_360
CLIP_L, CLIP_BIG_G, T5_XXL = 123_060_480, 694_659_840, 4_762_310_656
QWEN25_VL_7B = 8_292_166_656
OF_SD35 = CLIP_L + 768 * 768 + CLIP_BIG_G + T5_XXL
OF_FLUX = CLIP_L + T5_XXL
PUBLISHED = {  # hub ids whose configs are in ARCHITECTURES, with their text encoders' parameters
    "stabilityai/stable-diffusion-3.5-medium": OF_SD35,
    "stabilityai/stable-diffusion-3.5-large": OF_SD35,
    "stabilityai/stable-diffusion-3.5-large-turbo": OF_SD35,
    "black-forest-labs/FLUX.1-dev": OF_FLUX,
    "black-forest-labs/FLUX.1-schnell": OF_FLUX,
    "black-forest-labs/FLUX.1-Krea-dev": OF_FLUX,
    "black-forest-labs/FLUX.1-Kontext-dev": OF_FLUX,
    "Qwen/Qwen-Image": QWEN25_VL_7B,
    "Qwen/Qwen-Image-2512": QWEN25_VL_7B,
    "Qwen/Qwen-Image-2.1": 8_767_123_696,
    "Qwen/Qwen-Image-Edit": QWEN25_VL_7B,
    "Qwen/Qwen-Image-Edit-2509": QWEN25_VL_7B,
    "Qwen/Qwen-Image-Edit-2511": QWEN25_VL_7B,
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": 2_614_341_888,
    "Tongyi-MAI/Z-Image": QWEN3_4B,
    "Tongyi-MAI/Z-Image-Turbo": QWEN3_4B,
    "black-forest-labs/FLUX.2-klein-4B": QWEN3_4B,
    "black-forest-labs/FLUX.2-klein-base-4B": QWEN3_4B,
    "black-forest-labs/FLUX.2-klein-9B": QWEN3_8B,
    "black-forest-labs/FLUX.2-klein-base-9B": QWEN3_8B,
    "black-forest-labs/FLUX.2-dev": 24_011_361_280,
    "ByteDance-Seed/BAGEL-7B-MoT": 0,
}
