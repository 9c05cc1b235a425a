// SPDX-License-Identifier: GPL-2.0
//! Bar charts of both engines side by side, as SVG.

use std::path::Path;

use anyhow::{anyhow, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// The figures of one workload. A missing figure has no bar.
pub struct Bars {
    pub workload: String,
    pub ksm: Option<f64>,
    pub rksm: Option<f64>,
}

const SIZE: (u32, u32) = (960, 420);
const KSM: RGBColor = RGBColor(0xb0, 0xb0, 0xb0);
const RKSM: RGBColor = RGBColor(0xd9, 0x5f, 0x02);
/// The width of an engine's bar, as a part of a group's width; the rest is the gap.
const BAR: f64 = 0.38;

/// Draw the bars to `file`, on a logarithmic scale.
pub fn draw(file: &Path, title: &str, unit: &str, bars: &[Bars]) -> Result<()> {
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    chart(&area, title, unit, bars).map_err(|e| anyhow!("{}: {e}", file.display()))?;
    area.present()
        .map_err(|e| anyhow!("{}: {e}", file.display()))
}

/// Return the range of the scale: whole powers of ten around all values.
fn range(bars: &[Bars]) -> (f64, f64) {
    let values = bars
        .iter()
        .flat_map(|b| [b.ksm, b.rksm])
        .flatten()
        .filter(|&v| v > 0.0);
    let (least, most) = values.fold((f64::INFINITY, 0.0_f64), |(least, most), v| {
        (least.min(v), most.max(v))
    });
    if !least.is_finite() {
        return (1.0, 10.0);
    }
    let low = 10f64.powf((least / 1.5).log10().floor());
    // Room for the numbers, and for the legend above all bars.
    let high = 10f64.powf((most * 1.5).log10().ceil());
    (low, high.max(low * 10.0) * 5.0)
}

type Error = Box<dyn std::error::Error>;

fn chart(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    unit: &str,
    bars: &[Bars],
) -> Result<(), Error> {
    area.fill(&WHITE).map_err(|e| e.to_string())?;
    let (low, high) = range(bars);
    let names: Vec<&str> = bars.iter().map(|b| b.workload.as_str()).collect();
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(80)
        .build_cartesian_2d(0.0..names.len() as f64, (low..high).log_scale())
        .map_err(|e| e.to_string())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .x_labels(0)
        .y_desc(unit)
        .y_label_formatter(&|v| crate::table::figure(*v))
        .draw()
        .map_err(|e| e.to_string())?;
    for (n, (engine, color)) in [("ksmd", KSM), ("rksmd", RKSM)].into_iter().enumerate() {
        let bar = |(i, b): (usize, &Bars)| {
            let value = if n == 0 { b.ksm } else { b.rksm };
            let left = i as f64 + 0.5 + (n as f64 - 1.0) * BAR;
            let top = value.filter(|&v| v > low)?;
            Some(Rectangle::new(
                [(left, low), (left + BAR, top)],
                color.filled(),
            ))
        };
        chart
            .draw_series(bars.iter().enumerate().filter_map(bar))
            .map_err(|e| e.to_string())?
            .label(engine)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled()));
    }
    for (n, value) in [|b: &Bars| b.ksm, |b: &Bars| b.rksm]
        .into_iter()
        .enumerate()
    {
        let number = |(i, b): (usize, &Bars)| {
            let value = value(b).filter(|&v| v > low)?;
            let middle = i as f64 + 0.5 + (n as f64 - 0.5) * BAR;
            let style = centred(("sans-serif", 9).into_text_style(area), VPos::Bottom);
            Some(EmptyElement::at((middle, value)) + Text::new(brief(value), (0, -2), style))
        };
        chart
            .draw_series(bars.iter().enumerate().filter_map(number))
            .map_err(|e| e.to_string())?;
    }
    let label = |(i, name): (usize, &&str)| {
        let style =
            ("sans-serif", 13)
                .into_text_style(area)
                .pos(plotters::style::text_anchor::Pos::new(
                    plotters::style::text_anchor::HPos::Center,
                    plotters::style::text_anchor::VPos::Top,
                ));
        EmptyElement::at((i as f64 + 0.5, low)) + Text::new(short(name), (0, 6), style)
    };
    chart
        .draw_series(names.iter().enumerate().map(label))
        .map_err(|e| e.to_string())?;
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE)
        .border_style(BLACK)
        .label_font(("sans-serif", 14))
        .draw()
        .map_err(|e| e.to_string())?;
    Ok(())
}

fn centred(style: TextStyle<'_>, vertical: VPos) -> TextStyle<'_> {
    style.pos(Pos::new(HPos::Center, vertical))
}

/// Shorten a name that does not fit under its bars.
fn short(name: &str) -> String {
    name.replace("zero_use_zero_pages", "zero, uzp")
        .replace("_eager", ", e.")
}

/// Format a number with three digits and a unit prefix.
fn brief(value: f64) -> String {
    let (scaled, prefix) = match value {
        v if v >= 1e9 => (v / 1e9, "G"),
        v if v >= 1e6 => (v / 1e6, "M"),
        v if v >= 1e3 => (v / 1e3, "k"),
        v => (v, ""),
    };
    let digits = match scaled {
        s if s >= 100.0 => 0,
        s if s >= 10.0 => 1,
        _ => 2,
    };
    format!("{scaled:.digits$}{prefix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bars(ksm: f64, rksm: Option<f64>) -> Bars {
        Bars {
            workload: "unique".into(),
            ksm: Some(ksm),
            rksm,
        }
    }

    #[test]
    fn the_scale_holds_all_values() {
        assert_eq!(range(&[bars(5000.0, Some(170.0))]), (100.0, 50_000.0));
        assert_eq!(range(&[bars(0.0, None)]), (1.0, 10.0));
    }

    #[test]
    fn numbers_are_brief() {
        let brief = [9.0, 16_652.0, 1.56e9].map(brief);
        assert_eq!(brief, ["9.00", "16.7k", "1.56G"]);
    }

    #[test]
    fn a_plot_has_bars_and_names() {
        let file = std::env::temp_dir().join(format!("rksm-plot-{}.svg", std::process::id()));
        draw(&file, "A title", "a unit", &[bars(5000.0, Some(170.0))]).unwrap();
        let svg = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        for part in ["A title", "a unit", "unique", "ksmd", "rksmd"] {
            assert!(svg.contains(part), "no {part:?}");
        }
        // One bar of each engine, and one of each in the legend.
        for color in ["#B0B0B0", "#D95F02"] {
            assert_eq!(svg.matches(&format!("fill=\"{color}\"")).count(), 2);
        }
    }
}
