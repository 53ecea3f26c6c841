"""Tests that training with the cache equals training without it, and that entries of other encoders are not read."""

import io
import json
import shutil

import pytest
import torch
from pipelines import load, pipeline_folder
from ranks import on_ranks
from rich.console import Console
from runs import EVALUATION, HEAD, TRAIN, recipe, run_quietly, stage
from safetensors.torch import load_file
from test_run import assert_equal_weights, weights

from posttrain.cache import keys
from posttrain.cache.room import Room
from posttrain.data.family import Opening
from posttrain.data.place import Place
from posttrain.errors import ModelError, PosttrainError, RecipeError
from posttrain.models.sd3 import SD3FlowModel
from posttrain.recipe.file import dump_recipe, parse_recipe
from posttrain.shapes.dataset import build
from posttrain.stages.caches import fill_for_stage

SOAR = "{type: soar, trajectory_length: 2}"
SHOWS = TRAIN.replace("sample_every: null", "sample_every: 6")
BOTH = "prompts: true, latents: mean_logvar"


def cached(folder, what):
    return f"{HEAD}cache: {{{what}, path: {folder / 'cache'}}}\n"


def chain(head=HEAD, evaluation=EVALUATION):
    lora = stage("lora", SOAR, tune="{type: lora, rank: 2}")
    return recipe(stage("sft", train=SHOWS), lora, head=head, evaluation=evaluation)


def no_encoder(monkeypatch):
    def encode(*_):
        raise AssertionError("an encoder was called")

    for name in ("encode_prompts", "posterior"):
        monkeypatch.setattr(SD3FlowModel, name, encode)


def result(folder):
    """The trained weights and everything that a person sees."""
    lora = load_file(folder / "lora" / "final" / "pytorch_lora_weights.safetensors")
    records = [
        (folder / name / "evaluation" / "records.jsonl").read_bytes() for name in ("base", "sft", "lora")
    ]
    return {**weights(folder / "sft"), **lora}, [
        *records,
        (folder / "sft/samples/step-00000006.png").read_bytes(),
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    run_quietly(chain(), folder)
    return result(folder)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder whose ``cache`` was filled by a run."""
    folder = tmp_path_factory.mktemp("filled")
    printed = run_quietly(chain(cached(folder, BOTH)), folder / "first")
    return folder, printed


def assert_equal(folder, plain):
    trained, seen = result(folder)
    assert_equal_weights(trained, plain[0])
    assert seen == plain[1]


def test_training_while_the_cache_is_filled_equals_training_without_it_to_the_bit(filled, plain):
    assert_equal(filled[0] / "first", plain)


def test_another_run_reads_everything_calls_no_encoder_and_is_equal_to_the_bit(filled, plain, monkeypatch):
    folder, _ = filled
    no_encoder(monkeypatch)
    monkeypatch.setattr("posttrain.data.workers.cover_and_crop", None)  # nor is an image cut out
    printed = run_quietly(chain(cached(folder, BOTH)), folder / "second")
    assert_equal(folder / "second", plain)
    assert "sft: prompts: all " in printed
    assert "sft: latents: all 10, 33" in printed
    assert "encoding" not in printed


def test_the_size_is_told_before_anything_is_encoded(filled):
    folder, printed = filled
    assert "sft: latents: 10 of 10 are to be encoded, 333 kB of 333 kB, in the cache " in printed
    assert str(folder / "cache" / "mean_logvar-") in printed
    assert printed.index("sft: latents: 10 of 10") < printed.index("sft: encoding images  10/10")
    assert printed.count("encoding images") == 1  # the second stage shares them
    assert "lora: prompts: all " in printed


def test_prompts_alone_are_equal_to_the_bit_for_an_online_algorithm(tmp_path):
    def online(head):
        made = stage(
            "nft", "{type: diffusion_nft, group_size: 4, num_steps: 2}", rewards="jpeg_compressibility"
        )
        data = "{prompts: {type: shapes, count: 12}, resolution: 16}"
        return recipe(made.replace("{type: shapes, images: 10, seed: 1}", data), head=head)

    run_quietly(online(HEAD), tmp_path / "without")
    run_quietly(online(cached(tmp_path, "prompts: true")), tmp_path / "with")
    assert_equal_weights(weights(tmp_path / "without" / "nft"), weights(tmp_path / "with" / "nft"))


def test_a_damaged_cache_is_told_mended_and_changes_nothing(filled, plain, tmp_path):
    folder = shutil.copytree(filled[0] / "cache", tmp_path / "cache").parent
    for number, file in enumerate(sorted(folder.rglob("*.safetensors"))):
        content = bytearray(file.read_bytes())
        content[-1 if number % 2 else 20] ^= 1
        file.write_bytes(content)
    damaged = number + 1
    printed = run_quietly(chain(cached(folder, BOTH)), folder / "run")
    assert_equal(folder / "run", plain)
    assert printed.count("is damaged") == damaged
    assert "is damaged" not in run_quietly(chain(cached(folder, BOTH)), folder / "again")


def test_what_was_removed_in_the_middle_is_encoded_again(tmp_path, plain):
    made = chain(cached(tmp_path, BOTH))
    _, source = prepared(made.stages[0], made, tmp_path)
    shutil.rmtree(tmp_path / "cache")
    model, other = prepared(made.stages[0], made, tmp_path)
    shutil.rmtree(tmp_path / "cache")
    (_, one, _), (_, two, _) = (next(f.batches((0, 0), 0)) for f in (source, other))
    assert torch.equal(one.latents, two.latents)
    (tmp_path / "cache" / "x").mkdir(parents=True)
    assert "a photo of a zebra" not in source.prompts
    assert model.prompt_cache.conditions(["a photo of a zebra"])["pooled_projections"].isfinite().all()


def prepared(stage_, made, folder):
    """The model and source of a stage as its training sees them."""
    model = made.model.load(torch.device("cpu"), "fp32")
    source = stage_.data.open(Opening(model, folder / "data", stage_.train.batch_size))
    fill_for_stage(made, stage_, model, source, Console(quiet=True))
    return model, source


def images_recipe(folder, cache="", data=""):
    """A stage on 9 images, cut to another shape, the sixth of them broken."""
    if not (folder / "shapes").exists():
        build(folder / "shapes", 9, 3)
        rows = [json.loads(line) for line in (folder / "shapes" / "train.jsonl").read_text().splitlines()]
        (folder / "shapes" / "images" / f"{rows[5]['md5']}.jpg").write_bytes(b"no image")
        for row in rows:
            row["bw"], row["bh"] = 16, 24
        (folder / "shapes" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = stage("s").replace(
        "{type: shapes, images: 10, seed: 1}",
        f"{{images: {folder}/shapes/train.jsonl, image_dir: {folder}/shapes/images, tolerance: 0.5, {data}}}",
    )
    return recipe(text, head=cached(folder, cache) if cache else HEAD)


def seen(made, folder, count=12):
    _, source = prepared(made.stages[0], made, folder)
    taken = [batch for batch, _ in zip(source.batches((1, 2), 0), range(count), strict=False)]
    return [(n, list(d.ids), b.latents, b.conditions.rows(b.prompt_index)) for n, b, d in taken], source


@pytest.mark.parametrize("workers", [0, 1])
def test_mirrored_cut_and_broken_images_give_equal_batches_to_the_bit(tmp_path, workers):
    data = f"crop: center, flip: true, workers: {workers}"
    without, one = seen(images_recipe(tmp_path, data=data), tmp_path)
    for _ in range(2):
        within, other = seen(images_recipe(tmp_path, BOTH, data), tmp_path)
        for (n, ids, latents, rows), (n_, ids_, latents_, rows_) in zip(without, within, strict=True):
            assert (n, ids) == (n_, ids_)
            assert torch.equal(latents, latents_)
            assert all(torch.equal(rows[name], rows_[name]) for name in rows)
        assert one.skipped() == other.skipped()
        assert len(other.skipped()) == 1


def test_a_file_that_is_replaced_before_it_is_encoded_gives_its_entry_to_no_other(tmp_path, monkeypatch):
    made = images_recipe(tmp_path, "latents: sampled", "crop: center")
    files = sorted((tmp_path / "shapes" / "images").glob("*.jpg"))
    file, other = [file for file in files if file.read_bytes() != b"no image"][:2]
    content, reserve = file.read_bytes(), Room.reserve

    def replaced(*given):  # it is called after the images are hashed
        file.write_bytes(other.read_bytes())
        return reserve(*given)

    with monkeypatch.context() as patched:
        patched.setattr(Room, "reserve", replaced)
        batches, source = seen(made, tmp_path)
        mixed = by_image(batches)
    alike = [i for i, record in source.images["images"].records.items() if record.path in (file, other)]
    assert torch.equal(mixed[alike[0]][0], mixed[alike[1]][0])
    file.write_bytes(content)
    after, _ = seen(made, tmp_path)
    shutil.rmtree(tmp_path / "cache")
    assert all(torch.equal(a[2], b[2]) for a, b in zip(after, seen(made, tmp_path)[0], strict=True))


def by_image(batches):
    latents_of = {}
    for _, ids, latents, _ in batches:
        for i, row in zip(ids, latents, strict=True):
            latents_of.setdefault(i, []).append(row)
    return latents_of


def test_sampled_latents_are_one_draw_and_mean_and_variance_give_another_each_epoch(tmp_path):
    fixed, _ = seen(images_recipe(tmp_path, "latents: sampled", "crop: center"), tmp_path)
    drawn, source = seen(images_recipe(tmp_path, "latents: mean_logvar", "crop: center"), tmp_path)
    for rows in by_image(fixed).values():
        assert len(rows) >= 3
        assert all(torch.equal(row, rows[0]) for row in rows)
    for i, rows in by_image(drawn).items():
        assert not torch.equal(rows[0], rows[1])
        ((_, _, pixels),) = source.images["images"].centre_crops([(i, False)])
        mean, logvar = source.model.posterior(pixels[None])
        std = (0.5 * logvar[0]).exp() * source.model.vae.config.scaling_factor
        centre = source.model.latents(mean, logvar, torch.zeros_like(mean))[0]
        assert ((by_image(fixed)[i][0] - centre) / std).abs().max() < 5
        assert ((by_image(fixed)[i][0] - centre) / std).std() == pytest.approx(1, abs=0.4)


def test_bf16_is_half_the_size_and_close(tmp_path):
    exact, _ = seen(images_recipe(tmp_path, BOTH, "crop: center"), tmp_path)
    close, _ = seen(images_recipe(tmp_path, BOTH + ", dtype: bf16", "crop: center"), tmp_path)
    for (_, _, a, rows), (_, _, b, rows_) in zip(exact, close, strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2e-2)
        for name in rows:
            assert rows_[name].dtype == rows[name].dtype
            torch.testing.assert_close(rows[name], rows_[name], rtol=2**-8, atol=0)
    for kind in ("prompts", "mean_logvar"):
        small, large = sorted(
            sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            for folder in (tmp_path / "cache").glob(f"{kind}-*")
        )
        assert small < 0.6 * large


def test_ranks_encode_a_share_each_and_read_what_the_others_encoded(tmp_path, monkeypatch):
    made = images_recipe(tmp_path, BOTH, "crop: center, flip: true")
    models, encoded, hashed = [load(), load()], ([], []), []
    encode, hash_of = SD3FlowModel.posterior, Place.sha256
    monkeypatch.setattr(
        SD3FlowModel,
        "posterior",
        lambda m, pixels: encoded[models.index(m)].extend(pixels) or encode(m, pixels),
    )
    monkeypatch.setattr(Place, "sha256", lambda image: hashed.append(image) or hash_of(image))

    def work(world):
        opening = Opening(models[world.rank], tmp_path / "data", made.stages[0].train.batch_size)
        source = made.stages[0].data.open(opening)
        fill_for_stage(made, made.stages[0], models[world.rank], source, Console(quiet=True), world)
        return source

    sources = on_ranks(2, work)
    assert [len(own) in (8, 9) for own in encoded] == [True, True]  # of 9 images, mirrored too; one is broken
    assert len(hashed) == len(set(hashed)) == 9, "each file is read by one of them"
    no_encoder(monkeypatch)
    key = (0, 0)
    shares = [f.latents["images"].batches(4, key, 0, rank, 2) for rank, f in enumerate(sources)]
    for _, (one, kept), (other, kept_) in zip(range(6), *shares, strict=False):
        assert one.step == other.step
        assert not set(one.ids) & set(other.ids)
        assert len(kept) == len(one.ids)
        assert len(kept_) == len(other.ids)


def test_an_encoding_is_a_function_of_its_prompt_or_image_alone():
    model = load()
    prompts = [
        f"a photo of {a} {b}" for a in ("red", "green", "blue") for b in ("circle", "square", "triangle")
    ]
    together = model.encode_prompts(prompts)
    assert all(len(t) == len(prompts) for t in together.values())
    for chosen in ([3], [8, 0], [5, 4, 3, 2, 1], [*range(9), *range(9)]):
        encoded = model.encode_prompts([prompts[i] for i in chosen])
        assert all(torch.equal(encoded[name], together[name][chosen]) for name in together)
    pixels = torch.rand(9, 3, 16, 16) * 2 - 1
    posterior = model.posterior(pixels)
    for whole, part in zip(posterior, model.posterior(pixels[[4, 1]]), strict=True):
        assert torch.equal(part, whole[[4, 1]])
    assert [tuple(t.shape) for t in model.posterior(pixels[:0])] == [(0, 4, 8, 8)] * 2


def test_latents_are_those_that_diffusers_draws():
    model, noise = load(), torch.randn(2, 4, 8, 8)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = model.vae.encode(torch.cat([pixels, torch.zeros(6, 3, 16, 16)])).latent_dist
    drawn = posterior.mean[:2] + posterior.std[:2] * noise
    expected = (drawn - model.vae.config.shift_factor) * model.vae.config.scaling_factor
    assert torch.equal(model.encode_images(pixels, noise), expected)


def test_another_encoder_setting_or_machine_has_other_entries(tmp_path, monkeypatch):
    folder = shutil.copytree(pipeline_folder(), tmp_path / "other")

    def names(model, dtype="fp32"):
        return keys.store_identity("prompts", dtype, model, "prompts")[0], keys.store_identity(
            "x", dtype, model, "images"
        )[0]

    before = names(load())
    assert names(load()) == names(load(folder)) == before  # by content, not by place
    assert names(load(text_encoder_3=False))[0] != before[0]
    assert names(load(text_encoder_3=False))[1] == before[1]
    assert names(load(dtype="bf16"))[0] != before[0]
    assert names(load(), "bf16")[1] != before[1]
    longer = load()
    longer.spec = longer.spec.model_copy(update={"max_sequence_length": 17})
    assert names(longer)[0] != before[0]
    for file, changed in (("text_encoder_2/model.safetensors", 0), ("vae/config.json", 1)):
        path = folder / file
        path.write_bytes(path.read_bytes() + b" ")
        now = names(SD3FlowModel(load().spec, longer.pipeline, folder, longer.device))
        assert now[changed] != before[changed]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert names(load())[1] != before[1]


def test_prompts_and_images_have_keys_of_their_own():
    texts = ["a", "b", "A", "a ", "", "\ud800", "é", "e\u0301"]
    assert len({keys.digest(text) for text in texts}) == len(texts)
    assert keys.digest("ab", "c") != keys.digest("a", "bc")
    assert (
        keys.digest("x", 16, 24, True) != keys.digest("x", 16, 24, False) != keys.digest("x", 24, 16, False)
    )


def test_a_model_that_does_not_say_what_it_depends_on_is_not_cached():
    from toys import ToyModel

    with pytest.raises(ModelError, match="ToyModel does not say what its encodings of prompts depend on"):
        ToyModel().identity("prompts")


def test_what_exceeds_max_size_stops_the_stage_before_it_encodes_all(tmp_path):
    data = "{type: shapes, images: 600, seed: 1}"
    text = stage("s").replace("{type: shapes, images: 10, seed: 1}", data)
    made = recipe(text, head=cached(tmp_path, "latents: mean_logvar, max_size: 1MB"))
    with pytest.raises(PosttrainError, match=r"s: latents: 600 encodings take 20 MB, .*cache.max_size, 1 MB"):
        run_quietly(made, tmp_path / "run")


def test_a_run_goes_on_with_another_folder_or_limit(tmp_path):
    made = recipe(stage("sft"), head=cached(tmp_path, "prompts: true"))
    run_quietly(made, tmp_path / "run")
    cache = made.cache.model_copy(update={"path": tmp_path / "elsewhere", "max_size": 10**7})
    assert "finished before" in run_quietly(made.model_copy(update={"cache": cache}), tmp_path / "run")
    cache = made.cache.model_copy(update={"dtype": "bf16"})
    with pytest.raises(RecipeError, match=r"\n  cache\.dtype \(was 'fp32', now 'bf16 for prompts'\)\n"):
        run_quietly(made.model_copy(update={"cache": cache}), tmp_path / "run")


def test_a_recipe_with_a_cache_is_written_out_and_read_again():
    made = recipe(stage("s"), head=HEAD + "cache: {latents: sampled, max_size: 1.5 GB, dtype: bf16}\n")
    assert made.cache.max_size == 1_500_000_000
    assert parse_recipe(dump_recipe(made), "again.yaml", checks=False) == made
    assert recipe(stage("s")).cache.latents == "off"
    assert recipe(stage("s"), head=HEAD + "cache: {prompts: true, latents: off}\n").cache.latents == "off"


ONLINE = stage("nft", "{type: diffusion_nft, group_size: 4}", rewards="jpeg_compressibility").replace(
    "{type: shapes, images: 10, seed: 1}", "{prompts: {type: shapes, count: 4}, resolution: 16}"
)
REFUSED = [
    ("{prompts: true, max_size: 20 parsecs}", None, r"small.yaml:6: cache.max_size: '20 parsecs' is no size: .* 20GB"),
    ("{prompts: true, max_size: 10kB}", None, r"small.yaml:6: cache.max_size: .*1000000"),
    ("{prompts: true, max_size: -1}", None, r"small.yaml:6: cache.max_size: "),
    ("{prompts: true, max_size: 2.5}", None, r"small.yaml:6: cache.max_size: expected a whole number"),
    ("{latents: mean}", None, r"small.yaml:6: cache.latents: 'mean' is not allowed.*one of off, mean_logvar, sampled"),
    ("{promts: true}", None, r"small.yaml:6: cache.promts: no such field \(did you mean 'prompts'"),
    ("{max_size: 1GB}", None, r"small.yaml:6: cache.max_size: would have no effect, since nothing is cached"),
    ("{dtype: bf16}", None, r"small.yaml:6: cache.dtype: would have no effect"),
    ("{latents: sampled}", ONLINE, r"small.yaml:6: cache.latents: no stage trains on images"),
    (f"{{prompts: true, path: {__file__}}}", None, r"small.yaml:6: cache.path: .* is a file, a folder is expected"),
]  # fmt: skip


@pytest.mark.parametrize(("block", "stages", "words"), REFUSED, ids=[block for block, _, _ in REFUSED])
def test_a_cache_that_cannot_be_or_has_no_effect_is_refused_by_its_line(block, stages, words):
    with pytest.raises(RecipeError, match=words):
        recipe(stages or stage("s"), head=f"{HEAD}cache: {block}\n")


def test_random_crops_cannot_be_cached(tmp_path):
    with pytest.raises(RecipeError, match=r"stages.0.data.crop.*the latents of one crop.*crop: center"):
        images_recipe(tmp_path, BOTH, "crop: random")


def test_the_plan_says_what_is_cached_and_how_large_it_is(filled):
    from posttrain.planning.overview import overview

    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(overview(chain(cached(filled[0], BOTH))))
    line = next(line for line in console.export_text().splitlines() if line.startswith("cache:"))
    # (16 + 16 tokens) x 32 + 32 values
    assert "prompts, 4.22 kB each and latents (mean_logvar)" in line
    assert "at most 50 GB" in line
    each = load().encode_prompts(["a"])
    assert sum(t.numel() * t.element_size() for t in each.values()) == 4224


def test_the_command_line_shows_and_clears_the_cache(filled, tmp_path):
    from typer.testing import CliRunner

    from posttrain.cli.app import app

    folder = shutil.copytree(filled[0] / "cache", tmp_path / "cache")
    shown = CliRunner().invoke(app, ["cache", "--path", str(folder)])
    assert "prompts-" in shown.output
    assert "mean_logvar-" in shown.output
    assert "kB" in shown.output
    assert "removed" in CliRunner().invoke(app, ["cache", "clear", "--path", str(folder)]).output
    assert list(folder.rglob("*.safetensors")) == []
    assert "0 B in" in CliRunner().invoke(app, ["cache", "--path", str(folder)]).output.replace("\n", "")


def test_clearing_the_users_cache_removes_what_only_saves_time_too(filled, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from posttrain.cli.app import app
    from posttrain.data import index
    from posttrain.planning.store import Store

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = shutil.copytree(filled[0] / "cache", tmp_path / "posttrain")
    index.keep(index.file_of("a"), list(range(index.LEAST)))
    store = Store({}, folder / "counts" / "0.json")
    store.put(("a",), 1, lambda value: value)
    store.save()
    (folder / "counts" / "mine.txt").write_text("keep")
    shown = CliRunner().invoke(app, ["cache"]).output
    assert "what was read of large data sets" in shown
    assert "what plans counted" in shown

    CliRunner().invoke(app, ["cache", "clear", "--path", str(folder)])
    assert index.kept(index.file_of("a"), list), "with --path, folders of these names may be anybody's"
    assert "removed" in CliRunner().invoke(app, ["cache", "clear"]).output
    assert [file.name for file in folder.rglob("*") if file.is_file() and file.name != ".lock"] == [
        "mine.txt"
    ]
    assert "beside" not in CliRunner().invoke(app, ["cache"]).output
