"""The built-ins, registered through the same hooks as third-party plugins."""

from mergekit_vl.registry.hookspecs import Register, hookimpl


@hookimpl
def register_backbones(register: Register) -> None:
    register("micro", "mergekit_vl.backbones.micro:Micro", "the embedded CLIP of 48 x 48 images, no download")
    register("photo", "mergekit_vl.backbones.photo:Photo", "the embedded CLIP for photographs, no download")
    register(
        "clip",
        "mergekit_vl.backbones.clip:Clip",
        "an open_clip model with two towers: arch + pretrained tag, hf-hub: name, local file or folder",
    )
    register(
        "vision",
        "mergekit_vl.backbones.vision:Vision",
        "a timm image classifier: name + pretrained tag or local checkpoint; no text tower",
    )


@hookimpl
def register_adapters(register: Register) -> None:
    register("zero_shot", "mergekit_vl.adapters.zero_shot:ZeroShot", "class names in templates, nothing is tuned")
    register("prompt", "mergekit_vl.adapters.prompt:Prompt", "learnt context vectors before the class name")
    register("linear_head", "mergekit_vl.adapters.linear_head:LinearHead", "a weight vector and a bias per class")
    register("tower", "mergekit_vl.adapters.tower:Tower", "other weights for the backbone itself, perhaps with a head")


@hookimpl
def register_tuners(register: Register) -> None:
    register(
        "coop", "mergekit_vl.tuners.coop:CoOp", "context optimisation: cross-entropy on the shots (Zhou et al. 2022)"
    )
    register(
        "kgcoop", "mergekit_vl.tuners.kgcoop:KgCoOp", "CoOp held near the template's text features (Yao et al. 2023)"
    )
    register(
        "linear_probe",
        "mergekit_vl.tuners.linear_probe:LinearProbe",
        "a linear head on stored features: logistic regression by L-BFGS or SGD",
    )
    register(
        "full",
        "mergekit_vl.tuners.full:Full",
        "fine-tuning of the whole image tower, with a head or under the text tower; LP-FT",
    )


@hookimpl
def register_strategies(register: Register) -> None:
    register(
        "linear",
        "mergekit_vl.strategies.linear:Linear",
        "weighted average of the models' tensors or of their classifiers",
    )
    register(
        "wise_ft",
        "mergekit_vl.strategies.wise_ft:WiseFT",
        "line from zero-shot to fine-tuned at one coefficient (Wortsman et al. 2022)",
    )
    register(
        "uniform_soup",
        "mergekit_vl.strategies.uniform_soup:UniformSoup",
        "plain mean of the tuned models (Wortsman et al. 2022)",
    )
    register(
        "greedy_soup",
        "mergekit_vl.strategies.greedy_soup:GreedySoup",
        "mean of the tuned models that help on validation images (Wortsman et al. 2022)",
    )
    register(
        "ema",
        "mergekit_vl.strategies.ema:Ema",
        "exponential moving average over the checkpoints of one run (Polyak & Juditsky 1992)",
    )
    register(
        "slerp", "mergekit_vl.strategies.slerp:Slerp", "the arc between two models, tensor by tensor (Shoemake 1985)"
    )
    register(
        "nuslerp",
        "mergekit_vl.strategies.nuslerp:NuSlerp",
        "SLERP by weights, of tensors, rows, columns or task vectors (mergekit)",
    )
    register(
        "multislerp",
        "mergekit_vl.strategies.multislerp:MultiSlerp",
        "weighted mean of directions and lengths for many models (Goddard 2025)",
    )
    register("karcher", "mergekit_vl.strategies.karcher:Karcher", "mean on the sphere for many models (Karcher 1977)")
    register(
        "task_arithmetic",
        "mergekit_vl.strategies.task_arithmetic:TaskArithmetic",
        "base plus scaled task vectors (Ilharco et al. 2023)",
    )
    register(
        "lines",
        "mergekit_vl.strategies.lines:Lines",
        "task vectors scaled linearly with depth, little in the first blocks (Wang et al. 2024)",
    )
    register(
        "monosoup",
        "mergekit_vl.strategies.monosoup:MonoSoup",
        "one tuned model, without images: its update's first singular directions against the rest (Abdollahpoorrostam et al. 2026)",
    )
    register("ties", "mergekit_vl.strategies.ties:Ties", "trim, elect signs, disjoint mean (Yadav et al. 2023)")
    register(
        "dare_linear",
        "mergekit_vl.strategies.dare_linear:DareLinear",
        "random drop and rescale, then task arithmetic (Yu et al. 2023)",
    )
    register(
        "dare_ties",
        "mergekit_vl.strategies.dare_ties:DareTies",
        "random drop and rescale, then signs and mean of TIES (Yu et al. 2023)",
    )
    register(
        "della", "mergekit_vl.strategies.della:Della", "drop by magnitude rank, then signs and mean (Deep et al. 2024)"
    )
    register(
        "della_linear",
        "mergekit_vl.strategies.della_linear:DellaLinear",
        "drop by magnitude rank, then task arithmetic (Deep et al. 2024)",
    )
    register(
        "breadcrumbs",
        "mergekit_vl.strategies.breadcrumbs:Breadcrumbs",
        "task vectors without both tails of their magnitudes (Davari & Belilovsky 2023)",
    )
    register(
        "breadcrumbs_ties",
        "mergekit_vl.strategies.breadcrumbs_ties:BreadcrumbsTies",
        "Breadcrumbs, then signs and mean of TIES",
    )
    register(
        "model_stock",
        "mergekit_vl.strategies.model_stock:ModelStock",
        "mean of the tuned models pulled to the base by their angle (Jang et al. 2024)",
    )
    register(
        "sce",
        "mergekit_vl.strategies.sce:Sce",
        "select by variance, weigh by squares, erase minority signs (Wan et al. 2024)",
    )
    register(
        "consensus",
        "mergekit_vl.strategies.consensus:Consensus",
        "sum or TIES' sum of the task vectors where several tasks use it, by TALL-masks (Wang et al. 2024)",
    )
    register(
        "emr",
        "mergekit_vl.strategies.emr:Emr",
        "one elected vector, with a mask and a factor for each task; needs the task (Huang et al. 2024)",
    )
    register(
        "tall_mask",
        "mergekit_vl.strategies.tall_mask:TallMask",
        "sum of the task vectors, with a mask for each task; needs the task (Wang et al. 2024)",
    )
    register(
        "pcb",
        "mergekit_vl.strategies.pcb:Pcb",
        "each element by how the task vectors compete for it, within and between them (Du et al. 2024)",
    )
    register(
        "tsv_m",
        "mergekit_vl.strategies.tsv_m:TsvM",
        "first singular vectors of every task, made orthonormal (Gargiulo et al. 2025)",
    )
    register(
        "iso_c",
        "mergekit_vl.strategies.iso_c:IsoC",
        "sum of the task matrices with equal singular values (Marczak et al. 2025)",
    )
    register(
        "iso_cts",
        "mergekit_vl.strategies.iso_cts:IsoCTS",
        "Iso-C with singular vectors of each task's own (Marczak et al. 2025)",
    )
    register(
        "fisher",
        "mergekit_vl.strategies.fisher:Fisher",
        "mean weighted by each model's Fisher information on its own images (Matena & Raffel 2022)",
    )
    register(
        "regmean",
        "mergekit_vl.strategies.regmean:RegMean",
        "linear maps merged by least squares on each model's own images (Jin et al. 2023)",
    )
    register(
        "adamerging",
        "mergekit_vl.strategies.adamerging:AdaMerging",
        "coefficients of task vectors learnt by least entropy on unlabelled images (Yang et al. 2024)",
    )
    register(
        "ensemble",
        "mergekit_vl.strategies.ensemble:OutputEnsemble",
        "mean of the members' probabilities or logits, calibrated or not",
    )
    register(
        "repair",
        "mergekit_vl.strategies.repair:Repair",
        "the best of closed forms of one tuned model, on validation images of what is new and of what is kept",
    )
    register(
        "vrf",
        "mergekit_vl.strategies.vrf:Vrf",
        "image by image: fine-tuned near the training images that zero-shot fails on (Zhu et al. 2024)",
    )
    register(
        "mergetune",
        "mergekit_vl.strategies.mergetune:MergeTune",
        "continued fine-tuning under linear mode connectivity",
    )


@hookimpl
def register_datasets(register: Register) -> None:
    register(
        "microworld", "mergekit_vl.datasets.microworld:Microworld", "rendered tasks for the micro CLIP, no download"
    )
    register(
        "clothing", "mergekit_vl.datasets.clothing:Clothing", "400 photographs of ten kinds of clothing, no download"
    )
    register(
        "folder",
        "mergekit_vl.datasets.folder:Folder",
        "your images: train/val/test folders of classes, or one folder to split",
    )
    register(
        "table",
        "mergekit_vl.datasets.table:Table",
        "images by a table of paths and labels: CSV, TSV, JSON lines, Parquet (metadata.csv)",
    )
    register(
        "coop_layout",
        "mergekit_vl.datasets.coop_layout:CoOpLayout",
        "a data set of a tree prepared for CoOp, unchanged: its splits, its few-shot choice, its template",
    )


@hookimpl
def register_protocols(register: Register) -> None:
    register(
        "base_to_novel",
        "mergekit_vl.protocols.base_to_novel:BaseToNovel",
        "tune on half of the classes, test on both halves",
    )
    register(
        "few_shot", "mergekit_vl.protocols.few_shot:FewShot", "tune on k images of each class, test on all classes"
    )
    register(
        "robust",
        "mergekit_vl.protocols.robust:Robust",
        "tune on one distribution, test on it (ID) and on the dataset's shifts (OOD)",
    )
    register(
        "multi_task",
        "mergekit_vl.protocols.multi_task:MultiTask",
        "tune a model on each dataset, merge them into one, test it on all of them",
    )
    register(
        "new_and_kept",
        "mergekit_vl.protocols.new_and_kept:NewAndKept",
        "tune on the first data set, test on it and on what must not be forgotten: the other data sets",
    )
