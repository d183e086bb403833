package mvmoe.sample

import android.Manifest
import android.content.pm.PackageManager
import android.os.Bundle
import android.widget.Button
import android.widget.TextView
import androidx.activity.ComponentActivity
import androidx.activity.result.contract.ActivityResultContracts
import androidx.camera.core.CameraSelector
import androidx.camera.core.ImageAnalysis
import androidx.camera.core.Preview
import androidx.camera.lifecycle.ProcessCameraProvider
import androidx.camera.view.PreviewView
import androidx.core.content.ContextCompat
import java.util.concurrent.Executors
import mvmoe.sample.model.CameraModel
import mvmoe.sample.model.Screen

/** The camera's picture, and below it what the model sees in it, which expert answered, and what that took. */
class MainActivity : ComponentActivity() {
    private lateinit var model: CameraModel
    private val frames = Executors.newSingleThreadExecutor()

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.main)
        model = CameraModel(
            open = { openBundle(applicationContext, BuildConfig.BUNDLE_DIGEST, BuildConfig.BUNDLE_ADDRESS) },
            show = { screen -> runOnUiThread { show(screen) } },
        )
        findViewById<Button>(R.id.selftest).setOnClickListener { model.onSelfTest(::decodePng) }
        if (ContextCompat.checkSelfPermission(this, Manifest.permission.CAMERA) == PackageManager.PERMISSION_GRANTED) {
            startCamera()
        } else {
            registerForActivityResult(ActivityResultContracts.RequestPermission()) { granted ->
                if (granted) startCamera() else findViewById<TextView>(R.id.label).setText(R.string.needs_camera)
            }.launch(Manifest.permission.CAMERA)
        }
    }

    private fun startCamera() {
        val provider = ProcessCameraProvider.getInstance(this)
        provider.addListener({
            val preview = Preview.Builder().build()
            preview.surfaceProvider = findViewById<PreviewView>(R.id.preview).surfaceProvider
            val analysis = ImageAnalysis.Builder()
                .setBackpressureStrategy(ImageAnalysis.STRATEGY_KEEP_ONLY_LATEST)
                .setOutputImageFormat(ImageAnalysis.OUTPUT_IMAGE_FORMAT_RGBA_8888)
                .build()
            analysis.setAnalyzer(frames) { frame -> frame.use { model.onFrame { imageOf(frame) } } }
            provider.get().bindToLifecycle(this, CameraSelector.DEFAULT_BACK_CAMERA, preview, analysis)
        }, ContextCompat.getMainExecutor(this))
    }

    private fun show(screen: Screen) {
        findViewById<TextView>(R.id.label).text = screen.problem ?: screen.label
        val details = listOf(screen.expert, screen.timings, screen.resident, screen.selftest)
        findViewById<TextView>(R.id.details).text = details.filter { it.isNotEmpty() }.joinToString("\n")
    }

    override fun onTrimMemory(level: Int) {
        super.onTrimMemory(level)
        model.onTrimMemory()
    }

    override fun onDestroy() {
        super.onDestroy()
        frames.shutdown()
        model.close()
    }
}
